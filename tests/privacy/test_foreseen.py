"""What a planned run would cost, against a ledger that really records such runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlora_flwr import Account, Ledger, Segment, epsilon_spent
from fedlora_flwr.errors import BudgetExhausted

DELTA = 1e-4


def account(run: str, share: float, scope: str = "lifetime") -> Account:
    return Account("device-01", run, 4.0, DELTA, scope, share)


def admitted(ledger: Ledger, share: float, plan: Segment) -> int:
    """Record runs until the ledger refuses one, and return their number."""
    for number in range(100):
        try:
            ledger.record(account(f"run-{number}", share), 1, plan, plan)
        except BudgetExhausted:
            return number
    raise AssertionError("the ledger admits too many runs for this test")


@pytest.mark.parametrize(
    ("share", "noise", "steps"),
    [(0.0, 1.0, 20), (0.0, 1.5, 20), (2.0, 1.0, 20), (2.0, 1.5, 20), (2.0, 2.5, 10)],
)
def test_as_many_runs_fit_as_the_ledger_admits(
    tmp_path: Path, share: float, noise: float, steps: int
) -> None:
    plan = Segment(noise, 0.1, steps)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    said = ledger.foresee(account("", share), plan)
    assert said.before == 0.0
    assert said.alone == epsilon_spent([plan], DELTA).epsilon
    assert said.more == admitted(ledger, share, plan) - 1


def test_what_is_said_comes_true_after_an_earlier_run(tmp_path: Path) -> None:
    plan, other = Segment(2.0, 0.1, 20), Segment(3.0, 0.2, 7)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.record(account("before", 2.0), 1, other, other)
    said = ledger.foresee(account("", 2.0), plan)
    assert said.before == ledger.summary(account("", 2.0)).epsilon
    ledger.record(account("one", 2.0), 1, plan, plan)
    assert said.after == ledger.summary(account("", 2.0)).epsilon
    again = ledger.foresee(account("", 2.0), plan)
    assert said.more is not None
    assert again.more == said.more - 1


def test_runs_for_users_are_counted_as_such(tmp_path: Path) -> None:
    plan, ledger = Segment(1.5, 0.1, 20), Ledger(tmp_path / "ledger.sqlite")
    records = ledger.foresee(account("", 2.0), plan)
    assert ledger.foresee(replace(account("", 2.0), unit="user"), plan) == records


def test_a_budget_that_was_raised_after_the_first_run_is_noticed(tmp_path: Path) -> None:
    plan, ledger = Segment(2.0, 0.1, 20), Ledger(tmp_path / "ledger.sqlite")
    assert not ledger.foresee(account("", 2.0), plan).changed
    ledger.record(account("one", 2.0), 1, plan, plan)
    assert not ledger.foresee(account("", 2.0), plan).changed
    assert ledger.foresee(replace(account("", 2.0), epsilon=8.0), plan).changed


def test_a_run_with_a_budget_of_its_own_limits_no_later_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.foresee(account("", 0.0, "run"), Segment(2.0, 0.1, 20)).more is None


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_where_no_step_is_left_no_run_fits_any_more(tmp_path: Path, share: float) -> None:
    plan, ledger = Segment(1.5, 0.1, 10), Ledger(tmp_path / "ledger.sqlite")
    one = Segment(1.5, 0.1, 1)
    count = admitted(ledger, share, plan)
    with pytest.raises(BudgetExhausted) as some:
        ledger.foresee(account("", share), plan)
    for number in range(10):
        try:
            ledger.record(account(f"last-{number}", share), 1, one, one)
        except BudgetExhausted:
            break
    with pytest.raises(BudgetExhausted, match="so no run of this kind fits any more"):
        ledger.foresee(account("", share), plan)
    assert count > 0
    assert str(some.value).startswith("budget exhausted")
