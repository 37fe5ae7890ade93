"""Settings that have to fit each other."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue


def test_ranks_of_clients_take_turns() -> None:
    config = RunConfig.of({"strategy": "flexlora", "rank": 8, "client-ranks": "2, 4,8"})
    assert [config.client_rank(i) for i in range(5)] == [2, 4, 8, 2, 4]
    assert RunConfig.of({"rank": 8}).client_rank(3) == 8


@pytest.mark.parametrize("ranks", ["0", "9", "2,x", "2.5"])
def test_ranks_beyond_the_global_one_or_no_ranks_are_refused(ranks: str) -> None:
    with pytest.raises(InvalidValue, match="client-ranks"):
        RunConfig.of({"strategy": "flexlora", "rank": 8, "client-ranks": ranks})


@pytest.mark.parametrize(
    "other",
    [{"optimizer": "adamw"}, {"momentum": 0.9}, {"filter": "ema"}, {"precondition": True}],
)
def test_the_secant_needs_movements_whose_noise_is_known(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="curvature = 'secant'"):
        RunConfig.of({"curvature": "secant", **other})


def test_adam_and_preconditioning_exclude_each_other() -> None:
    with pytest.raises(InvalidValue, match="optimizer = 'adamw'"):
        RunConfig.of({"precondition": True, "optimizer": "adamw"})


def test_no_clipping_is_for_runs_without_noise() -> None:
    assert RunConfig.of({"clip-norm": math.inf, "epsilon": math.inf}).clip_norm == math.inf
    with pytest.raises(InvalidValue, match=r"clip-norm = inf.*epsilon = inf"):
        RunConfig.of({"clip-norm": math.inf})


def test_each_layer_is_a_block_where_choices_are_by_layer() -> None:
    assert RunConfig.of({}).block_pattern == ""
    assert RunConfig.of({"blocks": r"stages\.\d+"}).block_pattern == r"stages\.\d+"
    assert RunConfig.of({"groups": "layer"}).block_pattern == ".+"
    with pytest.raises(InvalidValue, match="groups = 'layer'"):
        RunConfig.of({"groups": "layer", "blocks": r"stages\.\d+"})


def test_a_whole_number_is_a_number_however_a_configuration_is_made() -> None:
    made = RunConfig(epsilon=8, lr_a=1)
    assert (made.epsilon, type(made.epsilon), type(made.lr_a)) == (8.0, float, float)
    assert made == RunConfig.of({"epsilon": 8, "lr-a": 1})
