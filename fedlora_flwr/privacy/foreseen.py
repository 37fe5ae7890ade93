"""What a planned run would cost a client's budget, and how many more runs like it would fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.account import Account, Tally, admit, summarize
from fedlora_flwr.privacy.accountants import Segment
from fedlora_flwr.privacy.budget import epsilon_spent
from fedlora_flwr.privacy.lifetime import choose_order

MOST = 1_000
"""Runs that are counted at most."""


@dataclass(frozen=True)
class Foreseen:
    """What a client's budget looks like before and after a planned run.

    Parameters
    ----------
    before, after : float
        ε that is spent in the account's scope before the run, and after it.
    alone : float
        ε of this run's steps by themselves, by PRV.
    more : int or None
        Runs like it that the ledger would admit after it, `MOST` at most. None where nothing limits
        their number: each run has a budget of its own, or ε is infinite.
    changed : bool
        Whether the ledger shows that ε or δ of the budget was another one when the client's first
        run fixed the order of its Rényi filter. Small changes, and changes under fixed settings,
        leave no trace in a ledger.
    """

    before: float
    after: float
    alone: float
    more: int | None
    changed: bool


def foresee(account: Account, tallies: Sequence[Tally], planned: Segment, lapse: float) -> Foreseen:
    """Work out what a run would spend, by the rule with which the ledger admits runs.

    Parameters
    ----------
    account : Account
        The client's budget, for a run that has not begun.
    tallies : Sequence[Tally]
        What the ledger holds in the account's scope, oldest first.
    planned : Segment
        σ, q and the number of all steps of the run.
    lapse : float
        Seconds without a new row after which another run loses the steps it has reserved.

    Raises
    ------
    BudgetExhausted
        The ledger would not admit the run.
    """
    before = summarize(account, tallies).epsilon if tallies else 0.0
    summary, order = admit(account, tallies, planned, planned.steps, lapse)
    alone = epsilon_spent([planned], account.delta).epsilon
    if account.scope == "run" or math.isinf(account.epsilon):
        return Foreseen(before, summary.epsilon, alone, None, changed=False)
    stored = next((t.order for t in tallies if t.order), None)
    now = choose_order(account.epsilon, account.delta, tallies[0].mechanism) if stored else None

    def fits(count: int) -> bool:
        """Tell whether one more run is admitted after ``count`` whole runs."""
        taken = replace(planned, steps=count * planned.steps)
        done = Tally(account.run, taken, taken.steps, order, 0.0, account.unit)
        following = replace(account, run=f"{account.run} and the next")
        try:
            admit(following, [*tallies, done], planned, planned.steps, lapse)
        except BudgetExhausted:
            return False
        return True

    return Foreseen(before, summary.epsilon, alone, _count(fits), changed=stored != now)


def _count(fits: Callable[[int], bool]) -> int:
    """Return how many counts in a row, from 1 on, fit."""
    good, bad = 0, 1
    while bad <= MOST and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, MOST + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
