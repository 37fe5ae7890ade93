"""DP-LoRA: both factors train in every round."""

from __future__ import annotations

from fedlora_flwr.strategies import DPLoRA
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import A_NAMES, B_NAMES, Tiny, arrays_of, moved, plans


def test_plans_by_round() -> None:
    assert plans(DPLoRA(), rounds=4) == ["*", "*", "*", "*"]


def test_what_trains_moves_and_the_rest_keeps_its_bits() -> None:
    tiny = Tiny(3)
    result = tiny.run(DPLoRA(), num_rounds=4)
    final = arrays_of(result.arrays)
    factors = [A_NAMES + B_NAMES] * 4
    assert moved(tiny, final, 4) == [{*names, "head.bias"} for names in factors]


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(DPLoRA)
