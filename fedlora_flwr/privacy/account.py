"""An account of a client's data: what it has spent, and whether a run may take more steps.

One of two rules decides.

*Fixed settings.* The first row in the ledger fixes σ and q, and PRV gives the ε of all steps that
may be taken. With scope ``"run"``, a run's settings are fixed for that run. With scope
``"lifetime"`` and no ``run_epsilon``, the client's first run fixes them for its life: a later run
may have more noise or a smaller rate, and each of its steps counts as a step of the first run. PRV
is valid here even if a server chooses later settings after it has seen earlier releases. A step
with σ' ≥ σ and q' ≤ q is post-processing of a step with σ and q (draw from the output without the
record with probability 1 - q'/q, then add the noise that is missing). Every step is therefore
bounded by the same pair of distributions after any history, and at most N of them compose to at
most N times that pair (arXiv 2106.08567, theorem 10). A run that stops early takes fewer steps,
which this bound covers.

*Rényi filter.* With scope ``"lifetime"`` and ``run_epsilon``, later runs may choose any settings.
`fedlora_flwr.privacy.lifetime` says how they are bounded, and why.

The device's owner chooses the rule, by scope and ``run_epsilon``, before the first release. If the
owner changes it later and a server could influence when, the two rules together give (ε, 2δ).

A run's first row reserves all steps that the run plans. They count against every other run until
the run has taken them, or has written no row for too long (`fedlora_flwr.privacy.ledger.LAPSE`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora_flwr.config.sections import PrivacySection
from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.errors import BudgetExhausted, InvalidValue
from fedlora_flwr.privacy.accountants import Segment, merge
from fedlora_flwr.privacy.budget import epsilon_spent
from fedlora_flwr.privacy.history import UNBOUND, Tally, Terms, bounded, is_bounded
from fedlora_flwr.privacy.lifetime import (
    allowance,
    choose_order,
    filtered_epsilon,
    run_divergence,
)

__all__ = [
    "UNBOUND", "Account", "LedgerSummary", "Tally", "Terms", "admit", "bounded", "counted",
    "summarize", "terms",
]  # fmt: skip

RDP_FILTER = "rdp-filter"
_NO_MORE = ", so no run of this kind fits any more"


@dataclass(frozen=True)
class Account:
    """A client's budget: the client, the run, and the size of the budget.

    Parameters
    ----------
    client : str
        Stable identity of the client's data, never Flower's node id.
    run : str
        Identity of the run.
    epsilon, delta : float
        The budget.
    scope : str
        ``"run"`` counts this run's releases, ``"lifetime"`` all releases on the client's data.
    run_epsilon : float (default: 0)
        With scope ``"lifetime"``: how much of ε one run may plan for. With 0, one run may plan for
        all of ε, and the first run fixes the settings of all runs.
    unit : str (default: "record")
        What ε is for, one of `fedlora_flwr.config.unit.UNITS`. Releases of two units never add up.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from fedlora_flwr import Ledger
    >>> account = Account("hospital-7", run="", epsilon=8.0, delta=1e-3, scope="lifetime")
    >>> with TemporaryDirectory() as folder:
    ...     summary = Ledger(Path(folder) / "ledger.sqlite").summary(account)
    >>> summary.epsilon, summary.steps
    (0.0, 0)
    """

    client: str
    run: str
    epsilon: float
    delta: float
    scope: str = "run"
    run_epsilon: float = 0.0
    unit: str = RECORD

    @classmethod
    def of(cls, config: PrivacySection, client: str, run: str) -> Account:
        """Return the account of a client under a run's budget."""
        scope, part = config.ledger_scope, config.run_epsilon
        return cls(client, run, config.epsilon, config.delta, scope, part, config.unit)


@dataclass(frozen=True)
class LedgerSummary:
    """What a client reports about its own account.

    Parameters
    ----------
    epsilon : float
        ε spent so far, including the current release. From 128 steps on it may be that of up to
        1.6 % more steps, but never of more than a run's plan.
    epsilon_budget, delta : float
        The budget.
    accountant : str
        How ``epsilon`` was worked out: ``"prv"`` or ``"rdp"`` for settings that were fixed before
        the first release, ``"rdp-filter"`` for runs whose settings may depend on earlier releases,
        ``"none"`` where ε is infinite.
    steps : int
        Private steps counted so far.
    """

    epsilon: float
    epsilon_budget: float
    delta: float
    accountant: str
    steps: int


def terms(account: Account, tallies: Sequence[Tally]) -> Terms:
    """Return what the account's history fixes for the next plan."""
    if account.scope == "run" or not tallies:
        return UNBOUND
    if _filtered(account, tallies):
        return Terms(order=_order(account, tallies, tallies[0].mechanism))
    first = tallies[0].mechanism
    return Terms(None, first.noise_multiplier, first.sample_rate)


def summarize(account: Account, tallies: Sequence[Tally]) -> LedgerSummary:
    """Return what the account has spent."""
    steps = sum(t.mechanism.steps for t in tallies)
    if _filtered(account, tallies):
        epsilon, name = 0.0, RDP_FILTER
        if steps:
            order = _order(account, tallies, tallies[0].mechanism)
            taken = sum(run_divergence(t.mechanism, order) for t in tallies)
            epsilon = filtered_epsilon(taken, account.delta, order)
    else:
        spent = epsilon_spent(_rounded(_counted(account, tallies), tallies), account.delta)
        epsilon, name = spent.epsilon, spent.accountant
    name = "none" if math.isinf(epsilon) else name
    return LedgerSummary(epsilon, account.epsilon, account.delta, name, steps)


def admit(
    account: Account, tallies: Sequence[Tally], planned: Segment, steps: int, lapse: float
) -> tuple[LedgerSummary, float | None]:
    """Decide whether a run may take its next steps.

    Parameters
    ----------
    account : Account
        The client's budget.
    tallies : Sequence[Tally]
        What the ledger holds in the account's scope, oldest first.
    planned : Segment
        σ, q and the number of all steps of the run.
    steps : int
        Steps of the next release.
    lapse : float
        Seconds without a new row after which another run loses the steps it has reserved.

    Returns
    -------
    tuple[LedgerSummary, float | None]
        The account after those steps, and the order of the client's filter, if it has one.

    Raises
    ------
    InvalidValue
        The settings are not those that the run began with, or the account's earlier releases have
        another unit.
    BudgetExhausted
        The steps exceed the run's plan; or plan, history and reservations together exceed the
        budget; or, under fixed settings, the plan has less noise or a larger rate than the first
        run.
    """
    _check_unit(account, tallies)
    own = [t for t in tallies if t.run == account.run]
    _check_settings(own, planned)
    taken = sum(t.mechanism.steps for t in own)
    # A run without noise makes no promise, so it reserves no steps.
    rest = planned.steps - taken if planned.noise_multiplier else steps
    if steps > rest:
        raise BudgetExhausted(
            f"budget exhausted: {steps} more steps after {taken} are beyond the {planned.steps} "
            "that this run has planned; start a new run for more"
        )
    held = [
        replace(t, mechanism=replace(t.mechanism, steps=_reserved(t, tallies)))
        for t in tallies
        if t.run != account.run and t.silent < lapse
    ]
    worst = [*tallies, *held, _tally(account.run, planned, rest)]
    if _filtered(account, tallies):
        order = _order(account, tallies, tallies[0].mechanism if tallies else planned)
        _check_filter(account, order, worst, planned)
    else:
        _check_fixed(account, tallies, held, worst, planned)
    return counted(account, tallies, planned, steps)


def counted(
    account: Account, tallies: Sequence[Tally], planned: Segment, steps: int
) -> tuple[LedgerSummary, float | None]:
    """Return what `admit` returns, for a release that has been admitted before."""
    after, order = [*tallies, _tally(account.run, planned, steps)], None
    if _filtered(account, tallies):
        order = _order(account, tallies, tallies[0].mechanism if tallies else planned)
        after = [replace(t, order=order) for t in after]
    return summarize(account, after), order


def _tally(run: str, planned: Segment, steps: int) -> Tally:
    return Tally(run, replace(planned, steps=steps), planned.steps, None, 0.0)


def _reserved(tally: Tally, tallies: Sequence[Tally]) -> int:
    """Return the steps that another run has planned and not taken."""
    taken = sum(t.mechanism.steps for t in tallies if t.run == tally.run)
    # A run that an earlier version recorded may have several tallies, one for each mechanism. All
    # of its reserved steps count in the first one.
    first = next(t for t in tallies if t.run == tally.run) is tally
    return max(0, tally.planned - taken) if first and tally.mechanism.noise_multiplier else 0


def _check_unit(account: Account, tallies: Sequence[Tally]) -> None:
    """Refuse a release for another unit: what a record has spent tells nothing about its user.

    The other way round fails, too. If a record changes, the mean of its user may move by 2C, so ε
    for users is less than ε for records.
    """
    if other := next((t.unit for t in tallies if t.unit != account.unit), None):
        allowed = (
            f"{other!r}, the unit of this data's earlier releases, since their ε is for one "
            f"{other}. Keep it. A promise for each {account.unit} needs a new client-id, and does "
            "not cover the earlier releases"
        )
        raise InvalidValue("unit", account.unit, allowed)


def _check_settings(own: Sequence[Tally], planned: Segment) -> None:
    if not own:
        return
    first, before = own[0].mechanism, own[0].planned
    given = planned.noise_multiplier, planned.sample_rate
    for key, value, fixed in zip(
        ("noise-multiplier", "sample-rate"),
        given,
        (first.noise_multiplier, first.sample_rate),
        strict=True,
    ):
        if value != fixed:
            raise InvalidValue(key, value, f"{fixed!r}, which this run's first round has fixed")
    if before and planned.noise_multiplier and planned.steps != before:
        allowed = f"{before}, which this run's first round has fixed"
        raise InvalidValue("planned steps", planned.steps, allowed)


def _filtered(account: Account, tallies: Sequence[Tally]) -> bool:
    """Tell whether the Rényi filter decides; otherwise PRV with fixed settings does.

    A server cannot influence the answer. The owner sets ``run_epsilon``, a stored order never
    changes, and under fixed settings the first run's settings bound each row of a later run.
    """
    if account.scope == "run" or math.isinf(account.epsilon):
        return False
    return account.run_epsilon > 0 or not bounded(tallies) or any(t.order for t in tallies)


def _order(account: Account, tallies: Sequence[Tally], first: Segment) -> float:
    stored = next((t.order for t in tallies if t.order), None)
    return stored or choose_order(account.epsilon, account.delta, first)


def _counted(account: Account, tallies: Sequence[Tally]) -> tuple[Segment, ...]:
    """Return the segments that PRV has to count, with equal mechanisms joined."""
    if account.scope == "lifetime" and tallies and math.isfinite(account.epsilon):
        steps = sum(t.mechanism.steps for t in tallies)
        return merge([replace(tallies[0].mechanism, steps=steps)])
    joined: dict[tuple[float, float], int] = {}
    for t in tallies:
        key = t.mechanism.noise_multiplier, t.mechanism.sample_rate
        joined[key] = joined.get(key, 0) + t.mechanism.steps
    return merge([Segment(*key, steps) for key, steps in joined.items()])


def _rounded(segments: tuple[Segment, ...], tallies: Sequence[Tally]) -> tuple[Segment, ...]:
    """Round a run's steps up, to the whole plan at most, before ε is worked out for a report.

    ε takes longer the more steps there are, and a long run asks for it after every round. The ε of
    a few more steps is an upper bound, and serves several rounds. Fewer than 128 steps stay as they
    are; above, fewer than 1.6 % are added. What a run may do is decided by the exact number.
    """
    if len(segments) != 1 or len({t.run for t in tallies}) != 1:
        return segments
    (segment,) = segments
    unit = 1 << max(0, segment.steps.bit_length() - 7)
    most = max(segment.steps, *(t.planned for t in tallies))
    return (replace(segment, steps=min(-(-segment.steps // unit) * unit, most)),)


def _check_fixed(
    account: Account,
    tallies: Sequence[Tally],
    held: Sequence[Tally],
    worst: Sequence[Tally],
    planned: Segment,
) -> None:
    if account.scope == "lifetime" and math.isfinite(account.epsilon) and tallies:
        first = tallies[0].mechanism
        if not is_bounded(planned, first):
            raise BudgetExhausted(
                f"budget exhausted: the first run on this data has fixed a noise multiplier of at "
                f"least {first.noise_multiplier:.6g} and a sampling rate of at most "
                f"{first.sample_rate:.6g} for all runs. Plan within these limits, or let the "
                "data's owner set run-epsilon"
            )
    epsilon = epsilon_spent(_counted(account, worst), account.delta).epsilon
    if not epsilon <= account.epsilon:
        taken = sum(t.mechanism.steps for t in tallies)
        more = sum(t.mechanism.steps for t in worst) - taken - (other := _steps(held))
        promised = max((t.planned for t in tallies), default=0)
        text = _waiting(other)
        if account.scope == "lifetime" and promised:
            left = max(0, promised - taken - other)
            text += f"; {left} of the {promised} steps that the first plans promised are left"
            text += "" if left else _NO_MORE
        raise BudgetExhausted(
            f"budget exhausted: {more} more steps after {taken} would spend ε = {epsilon:.4g}, "
            f"above the budget of {account.epsilon:g} at δ = {account.delta:g}{text}"
        )


def _check_filter(account: Account, order: float, worst: Sequence[Tally], planned: Segment) -> None:
    total = sum(run_divergence(t.mechanism, order) for t in worst)
    limit = allowance(account.epsilon, account.delta, order)
    if total <= limit:
        return
    rest = worst[-1].mechanism
    before = sum(run_divergence(t.mechanism, order) for t in worst[:-1])
    each = run_divergence(replace(planned, steps=1), order)
    left = math.floor(max(0.0, limit - before) / each)
    raise BudgetExhausted(
        f"budget exhausted: {rest.steps} more steps would take this data past ε = "
        f"{account.epsilon:g} at δ = {account.delta:g} over all its runs (Rényi filter of order "
        f"{order:g}); {left} steps of this kind are left after those that other runs have reserved"
        f"{'' if left else _NO_MORE}"
    )


def _steps(tallies: Sequence[Tally]) -> int:
    return sum(t.mechanism.steps for t in tallies)


def _waiting(steps: int) -> str:
    return f", counting {steps} steps that other runs have reserved" if steps else ""
