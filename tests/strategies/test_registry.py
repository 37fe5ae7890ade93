"""Strategies by name."""

from __future__ import annotations

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.strategies import STRATEGIES, DPLoRA, strategy_class


def test_strategies_by_name() -> None:
    assert {name: strategy_class(name) for name in STRATEGIES} == STRATEGIES
    assert strategy_class("dp-lora") is DPLoRA


def test_an_unknown_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'ffa-lora'"):
        strategy_class("ffalora")
