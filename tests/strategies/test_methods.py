from __future__ import annotations

import itertools

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout
from fedlora_flwr.strategies import STRATEGIES, FedLoRA, FFALoRA, LALoRA, RoLoRA, strategy_class
from tests.strategies.tiny import A_NAMES, B_NAMES, NAMES, Arrays, Tiny, arrays_of, start_arrays

LAYOUT = Layout.of(NAMES)


def moved(tiny: Tiny, final: Arrays, rounds: int) -> list[set[str]]:
    """Return the names of the arrays whose bits changed in each round."""
    states = [tiny.received(r) for r in range(1, rounds + 1)] + [final]
    return [
        {name for name in NAMES if before[name].tobytes() != after[name].tobytes()}
        for before, after in itertools.pairwise(states)
    ]


@pytest.mark.parametrize(
    ("strategy", "plans"),
    [
        (FedLoRA, ["*", "*", "*", "*"]),
        (FFALoRA, ["B"] * 4),
        (RoLoRA, ["B", "A", "B", "A"]),
        (LALoRA, ["B/A"] * 4),
    ],
)
def test_plans_by_round(strategy: type[FedLoRA], plans: list[str]) -> None:
    method = strategy()
    assert [str(method.plan(server_round, LAYOUT)) for server_round in range(1, 5)] == plans


@pytest.mark.parametrize(
    ("strategy", "factors"),
    [
        (FedLoRA, [A_NAMES + B_NAMES] * 4),
        (FFALoRA, [B_NAMES] * 4),
        (RoLoRA, [B_NAMES, A_NAMES, B_NAMES, A_NAMES]),
    ],
)
def test_what_trains_moves_and_the_rest_keeps_its_bits(
    strategy: type[FedLoRA], factors: list[tuple[str, ...]]
) -> None:
    tiny = Tiny(3)
    result = tiny.run(strategy(), num_rounds=4)
    final = arrays_of(result.arrays)
    assert moved(tiny, final, 4) == [{*names, "head.bias"} for names in factors]


def test_the_factors_of_ffa_lora_start_where_the_server_says() -> None:
    tiny = Tiny(2)
    final = arrays_of(tiny.run(FFALoRA(), num_rounds=3).arrays)
    for name in A_NAMES:
        assert final[name].tobytes() == start_arrays()[name].tobytes()


def test_strategies_by_name() -> None:
    assert {name: strategy_class(name) for name in STRATEGIES} == STRATEGIES
    assert strategy_class("dp-lora") is FedLoRA


def test_an_unknown_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'ffa-lora'"):
        strategy_class("ffalora")
