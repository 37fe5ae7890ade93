"""FFA-LoRA: B trains, and A stays where the server drew it."""

from __future__ import annotations

from fedlora_flwr.strategies import FFALoRA
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import A_NAMES, B_NAMES, Tiny, arrays_of, moved, plans, start_arrays


def test_plans_by_round() -> None:
    assert plans(FFALoRA(), rounds=4) == ["B"] * 4


def test_what_trains_moves_and_the_rest_keeps_its_bits() -> None:
    tiny = Tiny(3)
    result = tiny.run(FFALoRA(), num_rounds=4)
    final = arrays_of(result.arrays)
    factors = [B_NAMES] * 4
    assert moved(tiny, final, 4) == [{*names, "head.bias"} for names in factors]


def test_the_factors_of_ffa_lora_start_where_the_server_says() -> None:
    tiny = Tiny(2)
    final = arrays_of(tiny.run(FFALoRA(), num_rounds=3).arrays)
    for name in A_NAMES:
        assert final[name].tobytes() == start_arrays()[name].tobytes()


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FFALoRA)
