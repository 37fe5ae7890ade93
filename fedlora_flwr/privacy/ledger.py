"""The ledger on disk of a client's private releases, each written before anything of it leaves."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.account import (
    UNBOUND,
    Account,
    LedgerSummary,
    Tally,
    Terms,
    admit,
    counted,
    summarize,
    terms,
)
from fedlora_flwr.privacy.budget import Segment
from fedlora_flwr.privacy.foreseen import Foreseen, foresee
from fedlora_flwr.privacy.ledger_batch import Batch, Repeated, Row
from fedlora_flwr.privacy.ledger_connection import Connection
from fedlora_flwr.privacy.ledger_file import LOCAL, LedgerFile, witness_of
from fedlora_flwr.wire import ROUND

__all__ = ["LAPSE", "Account", "Ledger", "LedgerSummary", "Terms"]

LAPSE = 86_400.0
"""Seconds without a new row after which a run loses the steps it has reserved: one day."""

_PATIENCE = 60.0
_MAX_ROUND = 10**9
LEDGER = "ledger.sqlite"
"""Usual name of a ledger's file."""


class Ledger:
    """A durable list of releases, and of the steps that runs have reserved.

    Parameters
    ----------
    path : str or Path
        SQLite file. If missing, it is made with mode 600 and its folder with mode 700. Any number
        of processes may share it.
    lapse : float (default: one day)
        Seconds without a new row after which a run loses the steps it has reserved and not taken.
    witness : Path, optional
        File that shows whether the ledger has lost rows; ``<path>.witness`` by default. If it is in
        another folder, it also shows that the ledger's folder was deleted.
    patience : float (default: 60)
        Seconds to wait while another process writes.

    Raises
    ------
    LedgerDamaged
        The file or its witness has been changed, replaced or lost, or cannot be used. Every method
        raises this as well.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from tempfile import TemporaryDirectory
    >>> planned = Segment(noise_multiplier=1.0, sample_rate=0.1, steps=20)
    >>> account = Account(client="hospital-7", run="run-1", epsilon=8.0, delta=1e-3)
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "ledger.sqlite")
    ...     spent = ledger.record(account, 1, replace(planned, steps=5), planned)
    >>> round(spent.epsilon, 2), spent.steps
    (1.2, 5)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        lapse: float = LAPSE,
        witness: str | Path | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        self.path = Path(path)
        self.lapse = lapse
        self._file = LedgerFile(self.path, Path(witness) if witness else None, patience)

    @staticmethod
    def exists(path: str | Path, witness: str | Path | None = None) -> bool:
        """Tell whether a ledger exists, or the witness of one that existed."""
        path = Path(path)
        return path.exists() or Path(witness or witness_of(path)).exists()

    def reading(self) -> AbstractContextManager[Connection]:
        """Check the rows, and give a consistent snapshot of them for SQL that only reads."""
        self.flush()
        return self._file.reading()

    def summary(self, account: Account) -> LedgerSummary:
        """Return what the account has spent."""
        return summarize(account, self._read(account))

    def terms(self, account: Account) -> Terms:
        """Return what earlier runs on the client's data have fixed for the next plan."""
        return UNBOUND if account.scope == "run" else terms(account, self._read(account))

    def check(self, account: Account, planned: Segment) -> LedgerSummary:
        """Return what the account will have spent after a planned run; write nothing.

        Raises
        ------
        InvalidValue
            σ, q or the plan are not those that the run began with.
        BudgetExhausted
            The run would take the account past its budget.
        """
        tallies = self._read(account)
        taken = sum(t.mechanism.steps for t in tallies if t.run == account.run)
        rest = max(0, planned.steps - taken)
        return admit(account, tallies, planned, rest, self.lapse)[0]

    def foresee(self, account: Account, planned: Segment) -> Foreseen:
        """Return what a run that has not begun would cost the account; write nothing.

        Raises
        ------
        BudgetExhausted
            The run would take the account past its budget.
        """
        return foresee(account, self._read(account), planned, self.lapse)

    def record(
        self,
        account: Account,
        server_round: int,
        segment: Segment,
        planned: Segment,
        trust: str = LOCAL,
        inputs: str = "",
    ) -> LedgerSummary:
        """Write a release's row. Call it before the first private batch is read.

        A release that fails or is lost afterwards still counts: the failure may depend on records,
        and the server may have received a reply that seems lost. The first row of a run fixes σ and
        q and reserves the planned steps.

        Parameters
        ----------
        account : Account
            The client's budget.
        server_round : int
            Round, from 0.
        segment : Segment
            The private steps of this release.
        planned : Segment
            All private steps of the client's run, with the same σ and q.
        trust : str (default: "local")
            Trust model of the release, as information for readers of the ledger. σ and q alone
            decide what a release spends, so releases of all trust models add up.
        inputs : str (default: none)
            Digest of the inputs that decide the bits of the release, where these follow from a
            seed. A row with the same inputs is not written twice; `vouch` then has to be called
            before the release leaves (see `fedlora_flwr.privacy.repeats`).

        Returns
        -------
        LedgerSummary
            The account with this release.

        Raises
        ------
        InvalidValue
            σ, q or the plan are not those that the run began with, or the account's earlier
            releases have another unit.
        BudgetExhausted
            The release is beyond the plan, or the plan is beyond the budget. Nothing is written.

        Guarantees
        ----------
        *What holds.* When this returns, the row is on the disk, or it is held back by a `Batch` of
        this process, which writes it before anything of the release leaves. No later call in any
        process admits steps that take the account beyond its budget.
        *Under which assumptions.* Nobody restores the file and its witness to the same older state,
        and all releases of the data go through one ledger.
        *What does not hold.* The ledger counts the steps that callers report, and cannot check that
        no others are taken.
        """
        _check_request(server_round, segment, planned)
        repeated = (account, server_round, segment, planned, inputs)
        while True:
            if (summary := self._append(*repeated, trust)) is not None:
                return summary
            if row := next(iter(self._rows(*repeated)), None):
                return self._as_of(row, account, planned, segment.steps)

    def vouch(
        self,
        account: Account,
        server_round: int,
        segment: Segment,
        planned: Segment,
        trust: str,
        inputs: str,
        outputs: str,
    ) -> LedgerSummary:
        """Find the row that pays for a release's bits, or write one; call it before they leave.

        Parameters
        ----------
        account, server_round, segment, planned, trust, inputs
            The arguments with which `record` has been called before.
        outputs : str
            Digest of the release's bits.

        Returns
        -------
        LedgerSummary
            The account with this release, as it was when its row was written.

        Raises
        ------
        BudgetExhausted
            Each row with these inputs already pays for other bits, and the budget allows no new
            row.
        """
        repeated = (account, server_round, segment, planned, inputs)
        held = (batch := Batch.current()) and batch.row(self._file, account)
        if held and held.release == repeated and held.outputs in (outputs, ""):
            held.outputs = outputs
            return held.summary
        self.flush()
        while True:
            with self._file.writing() as writer:
                rows = _repeats(writer.db, *repeated)
                found = [row for row in rows if rows[row] in (outputs, "")]
                row = min(found, key=lambda row: (rows[row] == "", row), default=None)
                if row is not None and not rows[row]:
                    writer.settle(row, outputs)
            if row is not None:
                return self._as_of(row, account, planned, segment.steps)
            if (summary := self._append(*repeated, trust, outputs)) is not None:
                return summary

    def flush(self) -> None:
        """Write the rows that a `Batch` of this process holds back, if there is one."""
        if (batch := Batch.current()) is not None:
            batch.write()

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Do the same before an error leaves the block, since it may depend on records."""
        try:
            yield
        except BaseException:
            self.flush()
            raise

    def _append(
        self,
        account: Account,
        server_round: int,
        segment: Segment,
        planned: Segment,
        inputs: str,
        trust: str,
        outputs: str = "",
    ) -> LedgerSummary | None:
        """Write a row, or hold it back; return None if there is one already that pays as well."""
        batch = Batch.current() if account.scope == "run" else None
        if batch is not None and batch.row(self._file, account):
            batch.write()  # The account is admitted with the rows on the disk.
        repeated = (account, server_round, segment, planned, inputs)
        while (row := self._admitted(repeated, trust, outputs)) is not None:
            if batch is not None:
                batch.add(row)
                return row.summary
            with self._file.writing() as writer:
                written = row.write(writer)
            if written:
                return row.summary
        return None

    def _admitted(self, release: Repeated, trust: str, outputs: str) -> Row | None:
        """Make a row; return None if there is one already that pays as well."""
        account, server_round, segment, planned, inputs = release
        with self._file.glancing() as db:
            tallies = db.tallies(account)
            rows = _repeats(db, *release) if inputs else {}
        if any(not outputs or paid in (outputs, "") for paid in rows.values()):
            return None
        # Computing ε may take seconds, so no lock is held. The result is used only if no other
        # process has written to the account meanwhile.
        summary, order = admit(account, tallies, planned, segment.steps, self.lapse)
        values = (
            *_first_values(account, server_round, segment),
            datetime.now(UTC).isoformat(timespec="seconds"),
            int(planned.steps),
            order,
            trust,
            inputs,
            account.unit,
        )
        return Row(self._file, release, tallies, values, summary, outputs)

    def _rows(self, *repeated: *Repeated) -> dict[int, str]:
        with self.reading() as db:
            return _repeats(db, *repeated)

    def _as_of(self, row: int, account: Account, planned: Segment, steps: int) -> LedgerSummary:
        """Return the summary that `record` returned when it wrote this row."""
        with self.reading() as db:
            tallies = db.tallies(account, row)
        return counted(account, tallies, planned, steps)[0]

    def _read(self, account: Account) -> list[Tally]:
        with self.reading() as db:
            return db.tallies(account)


def opened_ledger(folder: Path) -> Ledger:
    """Return the ledger in a client's state folder; this process opens the same file only once."""
    path = folder / LEDGER
    try:
        at = path.stat()
    except OSError:
        return Ledger(path)
    return _opened(path, (at.st_dev, at.st_ino))


@lru_cache(maxsize=8)
def _opened(path: Path, _file: tuple[int, int]) -> Ledger:
    return Ledger(path)


def _check_request(server_round: int, segment: Segment, planned: Segment) -> None:
    if not 0 <= server_round <= _MAX_ROUND:
        raise InvalidValue(ROUND, server_round, f"a whole number from 0 to {_MAX_ROUND:,}")
    mechanism = segment.noise_multiplier, segment.sample_rate
    if mechanism != (planned.noise_multiplier, planned.sample_rate):
        allowed = f"the plan's {planned.noise_multiplier!r} and {planned.sample_rate!r}"
        raise InvalidValue("noise multiplier and sample rate", mechanism, allowed)


def _repeats(db: sqlite3.Connection, *repeated: *Repeated) -> dict[int, str]:
    """Return the rows of a release: each row's id, with the digest of the bits it pays for."""
    account, server_round, segment, _, inputs = repeated
    found = db.execute(
        "SELECT id, outputs FROM releases WHERE client = ? AND run = ? AND round = ? "
        "AND noise_multiplier = ? AND sample_rate = ? AND steps = ? AND inputs = ? ORDER BY id",
        (*_first_values(account, server_round, segment), inputs),
    )
    return dict(found)


def _first_values(
    account: Account, server_round: int, segment: Segment
) -> tuple[str, str, int, float, float, int]:
    """Return what a row begins with: client, run, round, noise multiplier, sample rate, steps."""
    noise, rate = float(segment.noise_multiplier), float(segment.sample_rate)
    return account.client, account.run, server_round, noise, rate, int(segment.steps)
