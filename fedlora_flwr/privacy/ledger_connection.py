"""A connection to the ledger's file, and the sums of rows that it has read."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedlora_flwr.privacy.account import Account, Tally
from fedlora_flwr.privacy.budget import Segment

_KEPT = 4096
"""Accounts whose sums are remembered, those that were asked for last."""


@dataclass
class Sum:
    """Rows of one run and one mechanism, summed up."""

    steps: int
    planned: int
    order: float | None
    last: str


@dataclass
class Sums:
    """The rows of an account up to a number, summed by run and mechanism, oldest first."""

    rows: int = 0
    found: dict[tuple[str, float, float, str], Sum] = field(default_factory=dict)

    def add(self, run: str, noise: float, rate: float, unit: str, more: Sum) -> None:
        """Add later rows."""
        one = self.found.setdefault((run, noise, rate, unit), Sum(0, 0, None, more.last))
        one.steps, one.planned = one.steps + more.steps, max(one.planned, more.planned)
        one.order = max((o for o in (one.order, more.order) if o is not None), default=None)
        one.last = max(one.last, more.last)

    def tallies(self, now: datetime) -> Iterator[Tally]:
        """Yield them as accounts count them."""
        for (run, noise, rate, unit), one in self.found.items():
            silent = (now - datetime.fromisoformat(one.last)).total_seconds()
            mechanism = Segment(noise, rate, one.steps)
            yield Tally(run, mechanism, one.planned, one.order, silent, unit)


class Connection(sqlite3.Connection):
    """A connection that remembers its sums, so that a long run does not sum all rows each time.

    Rows are only ever appended, and `LedgerFile` refuses a file from which rows are gone.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._sums: OrderedDict[tuple[str, str | None], Sums] = OrderedDict()

    def tallies(self, account: Account, before: int | None = None) -> list[Tally]:
        """Return the account's rows, or those before one, summed by run and mechanism."""
        run = account.run if account.scope == "run" else None
        sums = self._sums.setdefault((account.client, run), Sums())
        # A simulation's file may have the rows of millions of clients, each of which comes seldom.
        self._sums.move_to_end((account.client, run))
        if len(self._sums) > _KEPT:
            self._sums.popitem(last=False)
        if before is not None and before <= sums.rows:
            sums = Sums()
        where, values = "client = ? AND id > ?", [account.client, sums.rows]
        if run is not None:
            where, values = f"{where} AND run = ?", [*values, run]
        if before is not None:
            where, values = f"{where} AND id < ?", [*values, before]
        rows = self.execute(
            "SELECT run, noise_multiplier, sample_rate, unit, SUM(steps), MAX(planned), "  # noqa: S608
            f"MAX(rdp_order), MAX(written_at), MAX(id) FROM releases WHERE {where} "
            "GROUP BY run, noise_multiplier, sample_rate, unit ORDER BY MIN(id)",
            values,
        ).fetchall()
        for name, noise, rate, unit, steps, planned, order, last, number in rows:
            sums.add(name, noise, rate, unit, Sum(steps, planned, order, last))
            sums.rows = max(sums.rows, number)
        return list(sums.tallies(datetime.now(UTC)))


def connect(path: Path, patience: float) -> Connection:
    """Open the file so that what is committed is on the disk.

    Parameters
    ----------
    path : Path
        The file; made if missing.
    patience : float
        Seconds to wait while another process writes.
    """
    db = sqlite3.connect(path, timeout=patience, isolation_level=None, factory=Connection)
    # A row must survive a power cut right after the reply has left. SQLite's default deletes its
    # journal without a sync of the folder; if the journal reappeared after the cut, the row would
    # be undone. A persistent journal is emptied and synced instead. A write-ahead log would save
    # one sync, but would keep rows in a second file and would not work on network folders.
    db.execute("PRAGMA journal_mode = PERSIST")
    db.execute("PRAGMA synchronous = FULL")
    return db
