"""The ledger's file: a written row survives a power cut, and a lost or changed row is noticed.

Each row holds a SHA-256 over the digest of the row before it and its own content, so an edited,
inserted or missing row breaks the chain. A witness beside the file (`fedlora_flwr.privacy.witness`)
holds the number of rows and the last digest. It reveals a ledger that was cut off, restored from a
copy, replaced, emptied or deleted.

Order of writes. First a row is committed and synced, then the witness, and only then the call
returns. The witness is therefore never ahead of the file. After a kill between the two writes, the
file has a row that the witness does not count and no caller knows of. The next opening accepts it,
since it continues the chain, and advances the witness. To make a ledger, the witness is written
first, with 0 rows; then the complete file is put in place. A kill between leaves only the witness.

What can't be noticed: file and witness both restored from copies of the same time, both deleted, or
both rewritten by somebody who knows this format. This guards against accidents and careless hands,
not against the device's own administrator. Such accidents are rarer if the witness is in another
folder, on another disk, or outside the backups.

A process checks the whole chain once, when it first opens a file; later it checks new rows only.
A ledger of an earlier version has no chain. The first opening adds the chain over the rows that it
finds, in one transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.errors import LedgerDamaged
from fedlora_flwr.files import is_full, private_folder, replacing
from fedlora_flwr.operating_system import sync_path
from fedlora_flwr.privacy.ledger_connection import Connection, connect
from fedlora_flwr.privacy.witness import Head, Witness

_VERSION = 4
LOCAL = "local"
"""Trust model of a row whose client added all of the noise itself."""
_COLUMNS = (
    "client", "run", "round", "noise_multiplier", "sample_rate", "steps", "written_at",
    "planned", "rdp_order", "trust", "inputs", "unit",
)  # fmt: skip
_EARLIER = ("id", *_COLUMNS[:7])
_RELEASES = """
CREATE TABLE releases (
    id INTEGER PRIMARY KEY,
    client TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    written_at TEXT NOT NULL
)"""
_INDEX = "CREATE INDEX IF NOT EXISTS releases_of_client ON releases (client, run)"
_CHAINED = (
    "ALTER TABLE releases ADD COLUMN planned INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE releases ADD COLUMN rdp_order REAL",
    "ALTER TABLE releases ADD COLUMN digest TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE origin (ledger TEXT NOT NULL)",
)
_FIRST_CHAINED = (*_EARLIER, "planned", "rdp_order", "digest")
_LATER = {"trust": LOCAL, "inputs": "", "outputs": "", "unit": RECORD}
"""Columns that are newer than the chain, and their values in older rows."""
_LATER_IN = {1: 0, 2: 1, 3: 3}
"""How many of them earlier versions have."""
_SELECT = f"SELECT id, digest, {', '.join(_COLUMNS)} FROM releases"  # noqa: S608
_INSERT = (
    f"INSERT INTO releases (digest, {', '.join(_COLUMNS)}) "  # noqa: S608
    f"VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"
)
_COPIES = "Put back the newest copy of it and its witness. Without one, count its budget as spent"
_ROOM = "Make room there; its rows are whole"
_PLACE = "Check its disk, its folder and their permissions"
_KEPT = 8  # A thread has at most so many files open.


class _Connections(threading.local):
    """Connections of one thread; the one used most recently is the last."""

    def __init__(self) -> None:
        self.kept: dict[Any, Connection] = {}


_connections = _Connections()
Key = tuple[object, ...]
_checked: dict[Key, Head] = {}

Values = tuple[Any, ...]
"""A row's content, in the order of its columns."""


class LedgerFile:
    """A file with its witness.

    Parameters
    ----------
    path : Path
        SQLite file; made with its folder if missing.
    witness : Path, optional
        Its witness; ``<path>.witness`` by default.
    patience : float
        Seconds to wait for other processes.

    Raises
    ------
    LedgerDamaged
        The file or its witness has been changed, replaced or lost, or cannot be used.
    """

    def __init__(self, path: Path, witness: Path | None, patience: float) -> None:
        self.path = path
        self.witness = Witness(witness or witness_of(path), patience)
        self.patience = patience
        with self._named():
            private_folder(path.parent)
            private_folder(self.witness.path.parent)
        with self.reading():
            pass

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Check the rows, and give a consistent snapshot of them."""
        with self._named(), self._connection() as (db, key):
            db.execute("BEGIN")
            seen = self.witness.read()
            head = self._check(db, key, seen)
            yield db
            db.execute("ROLLBACK")
            # Only after the rollback: a writer that holds the witness's lock waits for readers.
            if seen is None or seen.rows < head.rows:
                with self.witness.locked() as witness:
                    witness.advance(head)

    @contextmanager
    def glancing(self) -> Iterator[Connection]:
        """Give the rows unchecked; the caller has to compare them with those in `writing`."""
        with self._named(), self._connection() as (db, _):
            yield db

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Check the rows, and give them while no other process can write.

        When the context ends, an appended row is durable and the witness counts it.
        """
        with self._named(), self._connection() as (db, key):
            db.execute("BEGIN IMMEDIATE")
            with self.witness.locked() as witness:
                writer = Writer(db, self._check(db, key, witness.newest))
                yield writer
                if writer.appended or writer.settled:
                    db.execute("COMMIT")
                    witness.advance(writer.head)
                    _checked[key] = writer.head

    def _check(self, db: sqlite3.Connection, key: Key, seen: Head | None) -> Head:
        """Check the rows that this process has not checked yet, and compare with the witness."""
        known = _checked.get(key)
        if known is None:
            self._check_pages(db)
            (ledger,) = db.execute("SELECT ledger FROM origin").fetchone() or ("",)
            known = Head.empty(str(ledger))
        head = self._follow(db, known, seen)
        if seen is None and head.rows:
            raise self._damaged(f"its witness {self.witness.path} is missing", _COPIES)
        _checked[key] = head
        return head

    def _follow(self, db: sqlite3.Connection, head: Head, seen: Head | None) -> Head:
        """Check the chain up to its last row; it has to contain the row that the witness names."""
        if seen is not None and seen.ledger != head.ledger:
            raise self._damaged("its witness belongs to another ledger", _COPIES)
        ledger, count, digest = head.ledger, head.rows, head.digest
        passed = seen is None or seen.rows < count or (seen.rows, seen.digest) == (count, digest)
        rows = db.execute(f"{_SELECT} WHERE id >= ? ORDER BY id", (count,))
        if count and ((last := rows.fetchone()) is None or last[:2] != (count, digest)):
            raise self._damaged("it has lost rows", _COPIES)
        for number, stored, *values in rows:
            count, digest = count + 1, chained(digest, values)
            if (number, stored) != (count, digest):
                raise self._damaged(f"its row {number} was changed, or an earlier one", _COPIES)
            passed = passed or (seen is not None and (seen.rows, seen.digest) == (count, digest))
        if not passed and seen is not None:
            text = f"its witness has recorded {seen.rows} rows that are not its {count} rows"
            raise self._damaged(text, _COPIES)
        return Head(ledger, count, digest)

    def _check_pages(self, db: sqlite3.Connection) -> None:
        """Check what the chain doesn't cover: the pages, and the index that queries use."""
        (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise self._damaged("its pages are damaged", _COPIES)

    @contextmanager
    def _connection(self) -> Iterator[tuple[Connection, Key]]:
        """Give this thread's connection, kept open: opening takes as long as writing a row."""
        kept = _connections.kept
        key = self._key()
        db = kept.pop(key, None) if key else None
        if db is None:
            db = self._open()
            key = self._key()
        while len(kept) >= _KEPT:
            kept.pop(next(iter(kept))).close()
        # Inserted last, as the one used most recently.
        kept[key] = db
        try:
            yield db, key
        finally:
            if db.in_transaction:
                db.rollback()

    def _key(self) -> Key:
        """Identify the file as it is now; empty if it is missing."""
        # A connection must not be used after a fork, or after another file has replaced its file.
        try:
            at = self.path.stat()
        except FileNotFoundError:
            return ()
        return os.getpid(), self.path, self.witness.path, self.patience, at.st_dev, at.st_ino

    def _open(self) -> Connection:
        if not self.path.exists():
            self._make()
        if not self.path.is_file():
            raise self._damaged("it is not a file", "Move it away, or set another state-dir")
        if not self.path.stat().st_size:
            raise self._damaged("it is empty", _COPIES)
        with contextlib.suppress(OSError):  # Another user may own the file.
            self.path.chmod(0o600)
        db = connect(self.path, self.patience)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise self._damaged("a newer version of this package wrote it", "Install that version")
        if version < _VERSION:
            self._migrate(db)
        if _columns(db) != (*_FIRST_CHAINED, *_LATER):
            raise self._damaged("it is not a ledger", "Move it away, or set another state-dir")
        return db

    def _make(self) -> None:
        with self.witness.locked() as witness:
            if self.path.exists():  # Another process was first.
                return
            seen = witness.newest
            if seen is not None and seen.rows:
                text = f"it is gone, but its witness {self.witness.path} counts {seen.rows} rows"
                raise self._damaged(text, _COPIES)
            head = Head.empty(seen.ledger if seen else uuid.uuid4().hex)
            witness.advance(head)
            # The journal of a deleted file must not be applied to the new file.
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
            with replacing(self.path) as draft:
                os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                try:
                    with contextlib.closing(connect(draft, self.patience)) as db:
                        db.execute("BEGIN")
                        db.execute(_RELEASES)
                        _chain(db, head)
                        db.execute("COMMIT")
                finally:
                    draft.with_name(f"{draft.name}-journal").unlink(missing_ok=True)
            sync_path(self.path.parent)
            sync_path(self.witness.path.parent)

    def _migrate(self, db: sqlite3.Connection) -> None:
        """Add the chain or the newer columns to a ledger of an earlier version."""
        with self.witness.locked() as witness:
            # Read without SQLite's lock: a process that holds it may be waiting for the witness.
            if db.execute("PRAGMA user_version").fetchone() == (_VERSION,):
                return
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > 0 and _columns(db) == (*_FIRST_CHAINED, *[*_LATER][: _LATER_IN[version]]):
                _add_columns(db)  # The digests of its rows stay (see `chained`).
                db.execute("COMMIT")
                return
            if _columns(db) != _EARLIER:
                db.execute("ROLLBACK")
                raise self._damaged("it is not a ledger", "Move it away, or set another state-dir")
            seen = witness.newest
            head = _chain(db, Head.empty(seen.ledger if seen else uuid.uuid4().hex))
            if head is None:
                raise self._damaged("it has lost rows", _COPIES)
            # A kill before the commit leaves a witness of the same chain as the next opening makes.
            if seen is not None and seen != head:
                text = f"its witness {self.witness.path} expects a chain of digests, which it lacks"
                raise self._damaged(text, _COPIES)
            witness.advance(head)
            db.execute("COMMIT")

    def _damaged(self, what: str, remedy: str) -> LedgerDamaged:
        return LedgerDamaged(f"The ledger {self.path} cannot be used: {what}. {remedy}.")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors of SQLite and of the file system into a `LedgerDamaged` with the path."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise self._damaged("another process has locked it", "End that process") from error
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise self._damaged(str(error), _ROOM) from error
            raise self._damaged(str(error), _PLACE) from error
        except sqlite3.Error as error:
            raise self._damaged(str(error), _COPIES) from error
        except OSError as error:
            remedy = _ROOM if is_full(error) else _PLACE
            text = f"{error.strerror or error} ({error.filename or self.witness.path})"
            raise self._damaged(text, remedy) from error


@dataclass
class Writer:
    """Writes to a file that no other process can write to.

    Parameters
    ----------
    db : Connection
        A connection in a transaction.
    head : Head
        Number and digest of the last row.
    """

    db: Connection
    head: Head
    appended: bool = False
    settled: bool = False

    def settle(self, row: int, outputs: str) -> None:
        """Note which bits a row pays for; the chain does not cover this column."""
        self.db.execute("UPDATE releases SET outputs = ? WHERE id = ?", (outputs, row))
        self.settled = True

    def append(self, values: Values) -> None:
        """Append a row."""
        digest = chained(self.head.digest, values)
        self._insert(self.db, (digest, *values))
        self.head = Head(self.head.ledger, self.head.rows + 1, digest)
        self.appended = True

    @staticmethod
    def _insert(db: sqlite3.Connection, values: Values) -> None:
        db.execute(_INSERT, values)


def witness_of(path: Path) -> Path:
    """Return the default path of a ledger's witness."""
    return path.with_name(f"{path.name}.witness")


def chained(digest: str, values: Values | list[Any]) -> str:
    """Return the digest of a row that follows one with ``digest``.

    The unit of a record, then empty inputs, and then the local trust model, are left out. Rows that
    were written before these columns were added therefore keep their digests.
    """
    for later in (RECORD, "", LOCAL):
        if values[-1] != later:
            break
        values = values[:-1]
    return hashlib.sha256(json.dumps([digest, *values]).encode()).hexdigest()


def _chain(db: sqlite3.Connection, head: Head) -> Head | None:
    """Add the chain to the existing rows; return None if their numbers have gaps."""
    for statement in (*_CHAINED, _INDEX):
        db.execute(statement)
    _add_columns(db)
    db.execute("INSERT INTO origin VALUES (?)", (head.ledger,))
    for number, _, *values in db.execute(f"{_SELECT} ORDER BY id").fetchall():
        head = Head(head.ledger, head.rows + 1, chained(head.digest, values))
        if number != head.rows:
            return None
        db.execute("UPDATE releases SET digest = ? WHERE id = ?", (head.digest, number))
    return head


def _add_columns(db: sqlite3.Connection) -> None:
    there = _columns(db)
    for name, held in _LATER.items():
        if name not in there:
            db.execute(f"ALTER TABLE releases ADD COLUMN {name} TEXT NOT NULL DEFAULT '{held}'")
    db.execute(f"PRAGMA user_version = {_VERSION}")


def _columns(db: sqlite3.Connection) -> tuple[str, ...]:
    return tuple(row[1] for row in db.execute("PRAGMA table_info(releases)"))
