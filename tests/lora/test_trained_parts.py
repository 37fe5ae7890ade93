"""The parameters of an adapter by part, on a model without a head."""

from __future__ import annotations

import pytest
from torch import nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.lora.trained_parts import parameters_of


def test_parts_are_found_and_a_missing_one_is_refused() -> None:
    spec = LoRASpec(rank=2, alpha=1.0, dropout=0.0, targets="0")
    model = attach(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), spec, seed=1).model
    shapes = {
        part: [tuple(p.shape) for p in parameters_of(model, (part,)).values()] for part in "ABW"
    }
    assert shapes == {"A": [(2, 3)], "B": [(4, 2)], "W": [(4, 3)]}
    assert len(parameters_of(model, ("W", "B", "A"))) == 3
    expected = r"parts = 'head' cannot be used: expected parts that this adapter has: A, B, W\."
    with pytest.raises(InvalidValue, match=expected):
        parameters_of(model, ("A", "head"))
