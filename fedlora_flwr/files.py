"""Where files of the user's are kept, who may read them, and how they are written whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return this package's folder under ``XDG_CACHE_HOME``, or under ``~/.cache`` without it.

    What is in it can be made again.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlora"


def data_folder() -> Path:
    """Return this package's folder under ``XDG_DATA_HOME``, or ``~/.local/share`` without it.

    What is in it, ledgers among it, cannot be made again.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fedlora"


def private_folder(path: Path) -> Path:
    """Make a folder that its owner alone may enter, with the folders above it, and return it.

    A folder that is there already keeps its mode, since its user may have chosen it. Others lose
    access to folders inside this package's own data folder and its cache of data sets.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    for one in reversed(missing):
        with suppress(FileExistsError):  # Another process was first.
            one.mkdir(mode=0o700)
    path.mkdir(exist_ok=True)
    ours = (data_folder(), cache_folder() / "datasets")
    if not missing and any(path.is_relative_to(one) for one in ours):
        mode = path.stat().st_mode
        if mode & 0o077:
            with suppress(OSError):  # It may be another user's.
                path.chmod(mode & 0o700)
    return path


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a draft, which takes the place of the file if no error comes."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
