"""A ledger's witness: a small file with the ledger's number of rows and its last digest.

Without it, a ledger that was cut off after some row, restored from a copy, or deleted would look
complete. The file has two slots of 512 bytes. A write replaces the slot with the older state, in
place, and is synced, so one slot is always complete after a kill or a power cut. Processes also
lock this file while they make a ledger or advance its witness.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlora_flwr.errors import LedgerDamaged
from fedlora_flwr.operating_system import read_at, sync, sync_content, try_lock, write_at

_SLOT = 512
_BINARY = getattr(os, "O_BINARY", 0)  # Windows changes the ends of lines without it.


@dataclass(frozen=True)
class Head:
    """A ledger's identity, number of rows and last digest.

    Parameters
    ----------
    ledger : str
        Identity of the ledger, drawn at random when the ledger is made.
    rows : int
        Number of rows.
    digest : str
        Digest of the last row, which covers all rows before it.
    """

    ledger: str
    rows: int
    digest: str

    @classmethod
    def empty(cls, ledger: str) -> Head:
        """Return the head of a ledger without rows."""
        return cls(ledger, 0, hashlib.sha256(ledger.encode()).hexdigest())


@dataclass(frozen=True)
class Witness:
    """The witness's file.

    Parameters
    ----------
    path : Path
        The file, in an existing folder.
    patience : float (default: 60)
        Seconds to wait for another process that has locked it.
    """

    path: Path
    patience: float = 60.0

    def read(self) -> Head | None:
        """Return the newest state; None if the file is missing or was never completed.

        Raises
        ------
        LedgerDamaged
            Both slots are damaged.
        """
        try:
            return self._slots(self.path.read_bytes())[0]
        except FileNotFoundError:
            return None

    @contextmanager
    def locked(self) -> Iterator[HeldWitness]:
        """Lock the file for this thread alone; it is made if missing.

        Raises
        ------
        LedgerDamaged
            Both slots are damaged, or another process has kept the lock for ``patience`` seconds.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _BINARY, 0o600)
        try:
            self._lock(descriptor)
            newest, at = self._slots(read_at(descriptor, 2 * _SLOT, 0))
            yield HeldWitness(descriptor, newest, at)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        end = time.monotonic() + self.patience
        while not try_lock(descriptor):
            if time.monotonic() > end:
                raise LedgerDamaged(
                    f"The ledger's witness {self.path} cannot be used: another process has "
                    "locked it. End that process."
                )
            time.sleep(0.001)

    def _slots(self, content: bytes) -> tuple[Head | None, int]:
        """Return the newest state, and the offset in bytes of the other slot."""
        first, second = _unpack(content[:_SLOT]), _unpack(content[_SLOT:])
        # A kill or a power cut while the file is made may leave a shorter file, or only zeros.
        made = len(content) >= 2 * _SLOT and content.strip(b"\0")
        if made and not first and not second:
            raise LedgerDamaged(
                f"The ledger's witness {self.path} is damaged. Put back the newest copies of it "
                "and of its ledger."
            )
        if second and (not first or second.rows > first.rows):
            return second, 0
        return first, _SLOT if first else 0


@dataclass(frozen=True)
class HeldWitness:
    """The file while no other thread or process may lock it.

    Parameters
    ----------
    descriptor : int
        Descriptor of the open file.
    newest : Head or None
        The newest state in the file.
    at : int
        Offset in bytes at which the next state is written.
    """

    descriptor: int
    newest: Head | None
    at: int

    def advance(self, head: Head) -> None:
        """Write a state and sync it, unless the file has a newer one."""
        if self.newest is not None and self.newest.rows >= head.rows:
            return
        if write_at(self.descriptor, _pack(head), self.at) < _SLOT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.newest is None:
            os.ftruncate(self.descriptor, 2 * _SLOT)
            sync(self.descriptor)
        else:
            # The file keeps its size, so only its content has to be synced.
            sync_content(self.descriptor)


def _pack(head: Head) -> bytes:
    line = f"{head.ledger} {head.rows} {head.digest}"
    return f"{line} {_check(line)}\n".encode().ljust(_SLOT, b"\0")


def _unpack(slot: bytes) -> Head | None:
    text = slot.rstrip(b"\0").decode("ascii", "replace").rstrip("\n")
    line, _, check = text.rpartition(" ")
    if not line or check != _check(line):
        return None
    ledger, rows, digest = line.split(" ")
    return Head(ledger, int(rows), digest)


def _check(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
