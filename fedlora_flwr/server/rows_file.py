"""A file of rows that only grows, and can be cut back to what it was at an earlier time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import FileTrouble, append
from fedlora_flwr.operating_system import sync_path


class RowsFile:
    """One file, of which this object knows the length and the digest without reading it again.

    Parameters
    ----------
    path : Path
        The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size, self._digest = 0, hashlib.sha256()

    def append(self, content: bytes) -> None:
        """Append all of the content, or nothing (see `fedlora_flwr.files.append`)."""
        append(self.path, content)
        self._size += len(content)
        self._digest.update(content)

    def durable(self) -> tuple[int, str]:
        """Let what was appended reach the disk; return the number of bytes and their SHA-256.

        Raises
        ------
        FileTrouble
            The file cannot be synced.
        """
        if self._size:
            try:
                sync_path(self.path)
            except OSError as error:
                raise FileTrouble.of(error, self.path) from error
        return self._size, self._digest.hexdigest()

    def check(self, size: int, digest: str) -> None:
        """Refuse a file that does not begin with so many bytes of this digest.

        Raises
        ------
        InvalidValue
            The file begins with other bytes.
        """
        content = self.path.read_bytes()[:size] if self.path.exists() else b""
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            allowed = "this file as the run wrote it. Restore it, or begin a new run"
            raise InvalidValue("file of rows", str(self.path), allowed)

    def cut(self, size: int) -> None:
        """Forget what comes after so many bytes."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) > size:
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise FileTrouble.of(error, self.path) from error
        self._size, self._digest = size, hashlib.sha256(content[:size])
