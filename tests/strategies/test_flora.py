"""FLoRA: stacks of updates are folded in, and training starts again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from scipy.stats import ks_2samp  # type: ignore[import-untyped]
from torch import nn

from fedlora_flwr.layout import factor_of
from fedlora_flwr.strategies import FLoRA, Upload
from tests.strategies.dense import (
    LAYOUT,
    RANK,
    SIZES,
    Array,
    Federation,
    close,
    federations,
    folded_product,
    mean_product,
    product,
)
from tests.strategies.products import Folding
from tests.strategies.resumed import assert_goes_on_bit_for_bit


class TestFLoRA(Folding):
    method = FLoRA
    rank_of_a_round = 2 * RANK


def test_flora_restarts_from_zero_b_and_another_a_every_round() -> None:
    def drawn(seed: int) -> list[dict[str, Array]]:
        run = Federation(FLoRA(seed=seed), rounds=3)
        return [
            {name: array for name, array in run.after(r).items() if factor_of(name)}
            for r in (1, 2, 3)
        ]

    first, again, other = drawn(5), drawn(5), drawn(6)
    seen = set()
    for arrays, same, different in zip(first, again, other, strict=True):
        for name, array in arrays.items():
            if factor_of(name) == "B":
                assert not array.any()
                continue
            assert array.tobytes() == same[name].tobytes()
            assert array.tobytes() != different[name].tobytes()
            seen.add(array[0, :3].tobytes())
    # Nor do layers share it.
    assert len(seen) == 3 * len(SIZES)


def test_flora_draws_a_as_peft_does() -> None:
    m, n, rank = 4, 400, 20
    names = LAYOUT.pair("blocks.0.fc")
    current = {names[1]: np.ones((rank, n)), names[0]: np.ones((m, rank))}
    upload = Upload("client", current, 1.0, {})
    fresh = FLoRA(seed=3).aggregate(2, current, [upload])[names[1]]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(n, m))
        adapted: Any = get_peft_model(model, LoraConfig(target_modules="0", r=rank))
    theirs = adapted.base_model.model[0].lora_A["default"].weight.detach().numpy()
    assert fresh.shape == theirs.shape
    assert ks_2samp(fresh.ravel(), theirs.ravel()).pvalue > 1e-3
    assert np.abs(fresh).max() <= n**-0.5
    assert ks_2samp(1.1 * fresh.ravel(), theirs.ravel()).pvalue < 1e-3


@given(made=federations())
def test_folding_restores_the_mean_exactly(
    made: tuple[dict[str, Array], list[Upload]],
) -> None:
    current, uploads = made
    before = {name: array.copy() for name, array in current.items()}
    after = FLoRA().aggregate(1, current, uploads)
    for layer in SIZES:
        expected = folded_product(before, layer) + mean_product(uploads, layer)
        close(product(after, layer), expected, 1e-12)
    assert all(np.array_equal(current[name], array) for name, array in before.items())


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FLoRA)
