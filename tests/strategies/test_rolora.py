"""RoLoRA: the factors take turns by round."""

from __future__ import annotations

from fedlora_flwr.strategies import RoLoRA
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import A_NAMES, B_NAMES, Tiny, arrays_of, moved, plans


def test_plans_by_round() -> None:
    assert plans(RoLoRA(), rounds=4) == ["B", "A", "B", "A"]


def test_what_trains_moves_and_the_rest_keeps_its_bits() -> None:
    tiny = Tiny(3)
    result = tiny.run(RoLoRA(), num_rounds=4)
    final = arrays_of(result.arrays)
    factors = [B_NAMES, A_NAMES, B_NAMES, A_NAMES]
    assert moved(tiny, final, 4) == [{*names, "head.bias"} for names in factors]


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(RoLoRA)
