"""LA-LoRA: the factors take turns by local step."""

from __future__ import annotations

from fedlora_flwr.strategies import LALoRA
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import plans


def test_plans_by_round() -> None:
    assert plans(LALoRA(), rounds=4) == ["B/A"] * 4


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(LALoRA)
