"""Processes that are found by a mark in their environment, however they were started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MARK = "FEDLORA_MARK"
"""Environment variable with the mark, which all processes below one inherit."""


def marked(mark: str) -> list[int]:
    """Return the processes that have a mark, in ascending order."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # It has ended meanwhile.
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def command_of(process: int) -> str:
    """Return a process's command line; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
