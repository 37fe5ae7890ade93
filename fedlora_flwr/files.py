"""Where files of the user's are kept, and how they are written in one piece."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
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
