"""The ledger: what a client's data have spent, on disk, written before anything is released."""

from __future__ import annotations

import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora_flwr.errors import BudgetExhausted
from fedlora_flwr.privacy.budget import Segment, epsilon_spent

_SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY,
    client TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    written_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS releases_of_client ON releases (client, run);
"""
_KEPT = 8  # files that a thread has open at most
_threads = threading.local()


@dataclass(frozen=True)
class Account:
    """Whose budget it is, and how large.

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
    """

    client: str
    run: str
    epsilon: float
    delta: float
    scope: str = "run"


@dataclass(frozen=True)
class LedgerSummary:
    """What a client tells about its own account.

    Parameters
    ----------
    epsilon : float
        Spent so far, the release at hand included.
    epsilon_budget, delta : float
        The budget.
    accountant : str
        Which accountant gave ``epsilon``.
    steps : int
        Private steps counted so far.
    """

    epsilon: float
    epsilon_budget: float
    delta: float
    accountant: str
    steps: int


class Ledger:
    """A durable list of releases.

    Parameters
    ----------
    path : Path
        SQLite file; made with its folder if missing. Any number of processes may share it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with self._connection():
            pass

    def summary(self, account: Account) -> LedgerSummary:
        """Return what the account has spent."""
        return self._summarise(account, self._history(account)[1])

    def check(self, account: Account, segment: Segment) -> LedgerSummary:
        """Return what the account will have spent after ``segment``, writing nothing.

        Raises
        ------
        BudgetExhausted
            The release would take the account past its budget.
        """
        return self._after(account, self._history(account)[1], segment)

    def record(
        self,
        account: Account,
        server_round: int,
        segment: Segment,
        planned: Segment | None = None,
    ) -> LedgerSummary:
        """Write a release. Call it before the release leaves the client.

        A reply that is lost afterwards still counts, since the server may have seen it.

        Raises
        ------
        BudgetExhausted
            The release would take the account past its budget; nothing is written.
        """
        with self._connection() as db:
            while True:
                seen, history = self._rows(db, account)
                # ε takes up to seconds, so it is worked out without the lock and kept only if no
                # other process has written to the account meanwhile.
                summary = self._after(account, history, segment)
                db.execute("BEGIN IMMEDIATE")
                if self._rows(db, account)[0] == seen:
                    self._insert(db, account, server_round, segment)
                    db.execute("COMMIT")
                    return summary
                db.execute("ROLLBACK")

    def _after(self, account: Account, history: list[Segment], segment: Segment) -> LedgerSummary:
        summary = self._summarise(account, [*history, segment])
        if not summary.epsilon <= account.epsilon:
            steps = sum(entry.steps for entry in history)
            raise BudgetExhausted(
                f"budget exhausted: {segment.steps} more steps after {steps} would spend "
                f"ε = {summary.epsilon:.4g} of {account.epsilon:g} at δ = {account.delta:g}"
            )
        return summary

    @staticmethod
    def _summarise(account: Account, history: list[Segment]) -> LedgerSummary:
        spent = epsilon_spent(history, account.delta)
        return LedgerSummary(
            epsilon=spent.epsilon,
            epsilon_budget=account.epsilon,
            delta=account.delta,
            accountant="none" if math.isinf(spent.epsilon) else spent.accountant,
            steps=sum(segment.steps for segment in history),
        )

    def _history(self, account: Account) -> tuple[int, list[Segment]]:
        with self._connection() as db:
            return self._rows(db, account)

    @staticmethod
    def _rows(db: sqlite3.Connection, account: Account) -> tuple[int, list[Segment]]:
        """Return the number of rows and their segments, equal mechanisms summed."""
        where, values = "client = ?", [account.client]
        if account.scope == "run":
            where, values = where + " AND run = ?", [*values, account.run]
        rows = db.execute(
            "SELECT noise_multiplier, sample_rate, SUM(steps), COUNT(*) FROM releases "  # noqa: S608
            f"WHERE {where} GROUP BY noise_multiplier, sample_rate ORDER BY MIN(id)",
            values,
        ).fetchall()
        return sum(row[3] for row in rows), [Segment(*row[:3]) for row in rows]

    @staticmethod
    def _insert(
        db: sqlite3.Connection, account: Account, server_round: int, segment: Segment
    ) -> None:
        db.execute(
            "INSERT INTO releases (client, run, round, noise_multiplier, sample_rate, steps, "
            "written_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                account.client,
                account.run,
                server_round,
                segment.noise_multiplier,
                segment.sample_rate,
                segment.steps,
                datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Give this thread's connection, kept open: opening takes as long as writing a row."""
        kept: dict[Any, sqlite3.Connection] = vars(_threads)
        db = kept.pop(self._key(), None) if self.path.exists() else None
        if db is None:
            db = _open(self.path)
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept))).close()
        # Last in, as the one used last.
        kept[self._key()] = db
        try:
            yield db
        finally:
            if db.in_transaction:
                db.rollback()

    def _key(self) -> tuple[object, ...]:
        # A connection is of no use after a fork, or to a file that has taken the place of its own.
        at = self.path.stat()
        return os.getpid(), self.path, at.st_dev, at.st_ino


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, isolation_level=None)
    # A row must survive a power cut right after the reply has left. SQLite's default removes its
    # journal without a sync of the folder: were the journal back after the cut, the row would be
    # undone. One that stays is emptied and synced. A write-ahead log would need a sync less, but
    # rows would lie beside the file, and no network folder could hold it.
    db.execute("PRAGMA journal_mode = PERSIST")
    db.execute("PRAGMA synchronous = FULL")
    db.executescript(_SCHEMA)
    return db
