"""Real processes of a test, found by a mark in their environment, and what they listen on."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.marked import MARK, command_of, marked
from benchmarks.marked import left_of as marked_and_left

__all__ = ["LOOPBACK", "MARK", "gathered", "left_of", "listening", "marked"]

_LISTENS = "0A"


def gathered(mark: str, count: int, patience: float = 60.0) -> list[int]:
    """Wait until so many are there: one that is just about to run its program has no mark yet."""
    deadline = time.monotonic() + patience
    while len(found := marked(mark)) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def left_of(mark: str, patience: float = 60.0) -> list[str]:
    """Return the command lines of those that do not end, and end them."""
    lines = []
    for process in marked_and_left(mark, patience):
        with suppress(OSError):
            lines.append(command_of(process))
            os.kill(process, signal.SIGKILL)
    return lines


def listening(processes: list[int]) -> set[str]:
    """Return the addresses that processes listen on, in the kernel's hexadecimal form."""
    sockets = set()
    for process in processes:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    sockets.add(str(Path(entry.path).readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_rest = fields = line.split()
            if state == _LISTENS and f"socket:[{fields[9]}]" in sockets:
                found.add(local.split(":")[0])
    return found


# As /proc/net writes 127.0.0.1, ::ffff:127.0.0.1 and ::1.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
