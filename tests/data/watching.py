"""Which files and folders Python opens, as the interpreter itself tells it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EVENTS = ("open", "os.listdir", "os.scandir")
_watched: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event in _EVENTS and arguments and isinstance(arguments[0], str | bytes):
        path = str(Path(os.fsdecode(arguments[0])).absolute())
        for folder, opened in _watched:
            if Path(path).is_relative_to(folder):
                opened.append(path)


# The interpreter keeps a hook for as long as it runs.
sys.addaudithook(_hook)


@contextmanager
def opened_in(folder: Path) -> Iterator[list[str]]:
    """Return the list, which grows, of what is opened in a folder meanwhile.

    Libraries in C++, such as Arrow, open files unseen; this package looks at a file's content
    before it hands it to them.
    """
    opened: list[str] = []
    entry = (folder, opened)
    _watched.append(entry)
    try:
        yield opened
    finally:
        _watched.remove(entry)
