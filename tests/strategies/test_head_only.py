"""Head only: no factor trains, and a model without a head that trains is refused."""

from __future__ import annotations

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import HeadOnly
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import NAMES, Tiny, arrays_of, moved, plans


def test_plans_by_round() -> None:
    assert plans(HeadOnly(), rounds=3) == ["-"] * 3


def test_the_head_moves_and_every_factor_keeps_its_bits() -> None:
    tiny = Tiny(3)
    final = arrays_of(tiny.run(HeadOnly(), num_rounds=3).arrays)
    assert moved(tiny, final, 3) == [{"head.bias"}] * 3


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(HeadOnly)


@pytest.mark.parametrize("plan", ["-", "B/-", "--", "B-/--"])
def test_a_step_that_trains_nothing_is_refused(plan: str) -> None:
    factors = Layout(tuple(name for name in NAMES if "lora" in name))
    with pytest.raises(InvalidValue, match=r"no head is shared \(train-head, share-head\)"):
        factors.check_plan(ComponentPlan.parse(plan))
    Layout(NAMES).check_plan(ComponentPlan.parse(plan))


def test_one_block_of_two_may_rest() -> None:
    layout = Layout(tuple(name for name in NAMES if "lora" in name))
    plan = ComponentPlan.parse("B-/-A")
    layout.check_plan(plan)
    assert layout.active(plan, 1) == ("blocks.0.fc.lora_B.weight",)
    assert layout.active(plan, 2) == ("blocks.1.fc.lora_A.weight",)
