"""Files that are expensive to make, kept in the user's cache folder with a checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import private_folder, read_or_make, replace_file


def read_or_build(path: Path, build: Callable[[], bytes]) -> bytes:
    """Return the content of a cached file; make the file if it is missing or damaged.

    If several processes need the missing file at once, one builds it and the others wait. All of
    them then read the same bytes.

    Parameters
    ----------
    path : Path
        Where the file is kept. ``<path>.sha256`` beside it suits ``sha256sum --check``.
    build : Callable[[], bytes]
        Makes the content.

    Returns
    -------
    bytes
        The content, which matches its checksum.

    Raises
    ------
    InvalidValue
        The file must be made, but its folder cannot be written to.
    """

    def make(draft: Path) -> None:
        content = build()
        draft.write_bytes(content)
        replace_file(_checksum_path(path), _checksum_line(path, content))

    if (content := _intact(path)) is not None:
        return content
    require_writable(path.parent)
    return read_or_make(path, lambda: _intact(path), make)


def _intact(path: Path) -> bytes | None:
    """Return the file's content if it exists and matches its checksum, else ``None``."""
    try:
        content, line = path.read_bytes(), _checksum_path(path).read_bytes()
    except OSError:
        return None
    return content if line == _checksum_line(path, content) else None


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode()


def require_writable(folder: Path) -> None:
    """Create a folder of the cache if it is missing, and check that it is writable.

    Raises
    ------
    InvalidValue
        The folder cannot be created or written to.
    """
    try:
        private_folder(folder)
    except OSError as error:
        raise _not_writable(folder) from error
    if not os.access(folder, os.W_OK):
        raise _not_writable(folder)


def _not_writable(folder: Path) -> InvalidValue:
    return InvalidValue("XDG_CACHE_HOME", str(folder), "a cache folder that can be written to")
