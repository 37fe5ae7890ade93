"""Real processes of a test, found by a mark in their environment, and what they listen on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.marked import MARK, command_of, marked
from benchmarks.marked import left_of as marked_and_left

__all__ = [
    "LOOPBACK", "MARK", "gathered", "group_of", "left_of", "listening", "marked", "remote_ends",
]  # fmt: skip

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


def group_of(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended meanwhile.
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def listening(processes: list[int]) -> set[str]:
    """Return the addresses that processes listen on, in the kernel's hexadecimal form."""
    rows = sockets_of(processes, ("tcp", "tcp6"))
    return {row[1].split(":")[0] for row in rows if row[3] == _LISTENS}


def remote_ends(process: int) -> set[tuple[str, int]]:
    """Return host and port of the other ends of a process's TCP and UDP sockets."""
    ends = [row[2].split(":") for row in sockets_of([process], ("tcp", "tcp6", "udp", "udp6"))]
    return {(host, int(port, 16)) for host, port in ends if int(port, 16)}


def sockets_of(processes: Iterable[int], kinds: Iterable[str]) -> list[list[str]]:
    """Return the rows of the kernel's tables that belong to sockets of processes (Linux)."""
    own = set()
    for process in processes:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    own.add(str(Path(entry.path).readlink()))
    rows = [
        line.split()
        for kind in kinds
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return [row for row in rows if f"socket:[{row[9]}]" in own]


# As /proc/net writes 127.0.0.1, ::ffff:127.0.0.1 and ::1.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
