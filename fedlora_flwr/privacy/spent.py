"""What a ledger's file says of each client: per run, and over all runs together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.account import Account, Tally, bounded, summarize
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.ledger_connection import Connection

# It decides nothing here: where a filter decides, its order is in the ledger.
_SOME_EPSILON = 1.0


@dataclass(frozen=True)
class Spent:
    """What one run, or all runs, spent of a client's data.

    Parameters
    ----------
    client : str
        Identity of the client's data.
    run : str
        Identity of the run; empty for all runs of the client together.
    rounds : int
        Releases: rows of the ledger.
    steps : int
        Private steps in these releases.
    noise_multiplier, sample_rate : float
        The least σ and the largest q of these steps.
    epsilon, delta : float
        ε at δ; infinite where a release had no noise.
    accountant : str
        As of `fedlora_flwr.privacy.account.LedgerSummary`.
    unit : str
        What ε is for: a record, or a user.
    first, last : str
        When the first and the last row were written, UTC, in ISO 8601.

    Examples
    --------
    >>> when = "2026-01-05T09:00:00+00:00"
    >>> one = Spent("hospital-7", "run-1", 1, 5, 1.0, 0.1, 1.2, 1e-3, "prv", when, when)
    >>> one.epsilon, one.delta
    (1.2, 0.001)
    """

    client: str
    run: str
    rounds: int
    steps: int
    noise_multiplier: float
    sample_rate: float
    epsilon: float
    delta: float
    accountant: str
    first: str
    last: str
    unit: str = RECORD


def spent(path: str | Path, delta: float, account: Account | None = None) -> list[Spent]:
    """Return what has been spent, by the ledger's file alone.

    Parameters
    ----------
    path : str or Path
        The ledger's file.
    delta : float
        δ at which ε is given: that of the client's budget.
    account : Account, optional
        A client's budget over its life. All runs of this client are then counted by the rule that
        the budget sets, also where a ledger does not tell the rule yet.

    Returns
    -------
    list[Spent]
        For each client its runs, oldest first, and then all of them together: where it has several,
        where a Rényi filter counts over its life, and for the client of ``account``. Where its
        runs are for records and for users there is no such row, because these do not add up. The ε
        of a run is that of the run alone, by PRV. The ε of all runs is that of the client's rule
        for its life (see `fedlora_flwr.privacy.account`). It may be larger than that of a client's
        only run, because a filter counts more for each step. Where each run had its own budget
        instead, no such rule is in force, and ε is the one of all steps by PRV, as if their
        settings had been fixed before the first.

    Raises
    ------
    InvalidValue
        There is no such file, or δ is not between 0 and 1.
    LedgerDamaged
        The ledger was changed or lost rows.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from fedlora_flwr import Account, Ledger, Segment
    >>> planned = Segment(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "ledger.sqlite"
    ...     account = Account("hospital-7", "run-1", epsilon=8.0, delta=1e-3)
    ...     _ = Ledger(file).record(account, 1, planned, planned)
    ...     (found,) = spent(file, delta=1e-3)
    >>> found.client, found.steps, round(found.epsilon, 2)
    ('hospital-7', 5, 1.2)
    """
    if not 0 < delta < 1:
        raise InvalidValue("delta", delta, "a number between 0 and 1")
    path = Path(path)
    if not path.is_file():
        raise InvalidValue("ledger", str(path), "the file of a ledger, such as ledger.sqlite")
    with Ledger(path).reading() as db:
        read = [
            _read(db, Account(client, run, math.inf, delta, "run" if run else "lifetime"), account)
            for client, run in _accounts(db, account)
        ]
    # Computing ε may take seconds, so no lock is held.
    return [_spent(*one) for one in read]


def _accounts(db: Connection, account: Account | None) -> list[tuple[str, str]]:
    """Return each client's runs, oldest first, and an empty name for all of them together."""
    rows = db.execute(
        "SELECT client, run, MIN(unit), MAX(rdp_order IS NOT NULL) FROM releases "
        "GROUP BY client, run ORDER BY MIN(id)"
    )
    runs: dict[str, dict[str, str]] = {}
    whole = {account.client} if account else set()
    for client, run, unit, filtered in rows:
        own = runs.setdefault(client, {})
        own[run] = unit
        if filtered or len(own) > 1:
            whole.add(client)
    return [
        (client, run)
        for client, own in runs.items()
        for run in (*own, *([""] if client in whole and len({*own.values()}) == 1 else []))
    ]


def _read(
    db: Connection, account: Account, given: Account | None
) -> tuple[Account, list[Tally], tuple[int, str, str]]:
    """Return an account with its rows: those of each mechanism, and how many and from when."""
    tallies = db.tallies(account)
    if not account.run:
        if given is not None and given.client == account.client:
            account = replace(given, run="", delta=account.delta, scope="lifetime")
        elif bounded(tallies) or any(t.order for t in tallies):
            account = replace(account, epsilon=_SOME_EPSILON)
    return account, tallies, _rows(db, account.client, account.run)


def _spent(account: Account, tallies: list[Tally], rows: tuple[int, str, str]) -> Spent:
    summary, mechanisms = summarize(account, tallies), [t.mechanism for t in tallies]
    return Spent(
        client=account.client,
        run=account.run,
        rounds=rows[0],
        steps=summary.steps,
        noise_multiplier=min(m.noise_multiplier for m in mechanisms),
        sample_rate=max(m.sample_rate for m in mechanisms),
        epsilon=summary.epsilon,
        delta=account.delta,
        accountant=summary.accountant,
        first=rows[1],
        last=rows[2],
        unit=tallies[0].unit,
    )


def _rows(db: Connection, client: str, run: str) -> tuple[int, str, str]:
    rows = db.execute(
        "SELECT COUNT(*), MIN(written_at), MAX(written_at) FROM releases "
        "WHERE client = ? AND (run = ? OR ? = '')",
        (client, run, run),
    )
    count, first, last = rows.fetchone()
    return int(count), str(first), str(last)
