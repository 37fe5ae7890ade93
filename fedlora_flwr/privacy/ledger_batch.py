"""Rows of the ledger that a process holds back, and writes together with one sync of the disk.

A process that serves simulated clients, one after the other, may hold the replies of some of them.
Nothing of their releases is outside of it before the last of these has trained. So it may write
their rows at once, if it does so before it passes on the first reply.

Why no release is left uncounted. A row has to be on the disk before anything that depends on its
private steps is outside of the process that took them: a reply, a file, a line of a log. Whoever
holds rows back (`fedlora_flwr.simulations.local_grid`) passes on no reply before `write` has
returned, and if `write` fails, it passes on none at all. A client that fails, or that keeps arrays
in a file, has its row written before the error or the array leaves its round (`Ledger.flush`). If
the process is killed or the power is cut before `write`, rows and results are lost together, so the
steps have told nobody anything. A round that is asked for again then is a new release.

Rows are held back for budgets of one run only. Nobody else takes steps of such an account, so it is
admitted with the rows that are on the disk. `write` compares them again, and refuses the rows if
another process has written to the account. A budget over all runs may be shared with other
processes, and these must see each row at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fedlora_flwr.errors import LedgerDamaged

if TYPE_CHECKING:  # A grid needs no accountant, which the core does not have.
    from fedlora_flwr.privacy.account import Account, LedgerSummary, Tally
    from fedlora_flwr.privacy.budget import Segment
    from fedlora_flwr.privacy.ledger_file import LedgerFile, Values, Writer

Repeated: TypeAlias = "tuple[Account, int, Segment, Segment, str]"
"""A release that may be asked again: account, round, segment, plan and the inputs' digest."""


@dataclass
class Row:
    """A row that was admitted and is not written yet.

    Parameters
    ----------
    file : LedgerFile
        Where it belongs.
    release : Repeated
        What it is for.
    tallies : list[Tally]
        The account's rows with which it was admitted.
    values : Values
        Its content.
    summary : LedgerSummary
        The account with it.
    outputs : str (default: none)
        Digest of the bits that it pays for.
    """

    file: LedgerFile
    release: Repeated
    tallies: list[Tally]
    values: Values
    summary: LedgerSummary
    outputs: str = ""

    def write(self, writer: Writer) -> bool:
        """Append the row, unless the account has new rows; tell whether that was done."""
        if not _same(writer.db.tallies(self.release[0]), self.tallies):
            return False
        writer.append(self.values)
        if self.outputs:
            writer.settle(writer.head.rows, self.outputs)
        return True


@dataclass
class Batch:
    """Rows that are written together.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from fedlora_flwr import Ledger
    >>> from fedlora_flwr.privacy.account import Account
    >>> from fedlora_flwr.privacy.budget import Segment
    >>> planned, batch = Segment(1.0, 0.1, steps=5), Batch()
    >>> accounts = [Account(client, "run-1", epsilon=8.0, delta=1e-3) for client in ("a", "b")]
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "ledger.sqlite")
    ...     with batch.gathering():
    ...         for account in accounts:
    ...             _ = ledger.record(account, 1, planned, planned)
    ...     batch.write()
    ...     [ledger.summary(account).steps for account in accounts]
    [5, 5]
    """

    _rows: dict[tuple[Path, Account], Row] = field(default_factory=dict)
    # A process that is forked while rows are held back must not hold back its own.
    _process: int = field(default_factory=os.getpid)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Hold back the rows that are recorded in this block, in this thread; see `write`."""
        token = _gathering.set(self)
        try:
            yield
        finally:
            _gathering.reset(token)

    @classmethod
    def current(cls) -> Batch | None:
        """Return the batch that holds rows back now, if there is one."""
        batch = _gathering.get()
        return batch if batch is not None and batch._process == os.getpid() else None

    def add(self, row: Row) -> None:
        """Hold a row back."""
        self._rows[row.file.path, row.release[0]] = row

    def row(self, file: LedgerFile, account: Account) -> Row | None:
        """Return the account's row that is held back, if there is one."""
        return self._rows.get((file.path, account))

    def write(self) -> None:
        """Write all rows, durably; each file gets all of its rows or none.

        Raises
        ------
        LedgerDamaged
            A file cannot be written, or another process has written to one of the accounts. No
            release of the rows may leave.
        """
        rows, self._rows = list(self._rows.values()), {}
        for path in dict.fromkeys(row.file.path for row in rows):
            own = [row for row in rows if row.file.path == path]
            with own[0].file.writing() as writer:
                for row in own:
                    if not row.write(writer):
                        account = row.release[0]
                        raise LedgerDamaged(
                            f"The ledger {path} cannot be used: another process has counted steps "
                            f"of {account.client} in the run {account.run} meanwhile. Let one "
                            "process at a time serve a run's clients."
                        )


_gathering: ContextVar[Batch | None] = ContextVar("gathering", default=None)


def _same(now: list[Tally], before: list[Tally]) -> bool:
    """Tell whether an account has no new rows since it was read before."""
    return [(t.run, t.mechanism, t.unit) for t in now] == [
        (t.run, t.mechanism, t.unit) for t in before
    ]
