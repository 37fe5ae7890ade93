"""Processes that are found by a mark in their environment, however they were started."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

MARK = "FEDLORA_MARK"
"""Environment variable with the mark, which all processes below one inherit."""
KINDS = {
    "keeper.py": "keeper",
    "spawn_main": "worker",
    "resource_tracker": "resource tracker",
    "flwr-serverapp": "ServerApp",
    "deploy.client_process": "ClientApp",
    "clients.warm": "warm process",
    "deploy.superexec_process": "device's SuperExec",
    "flower-superexec": "SuperExec",
    "flower-superlink": "SuperLink",
    "deploy serve": "SuperLink",
    "flower-supernode": "SuperNode",
    "deploy.node_process": "SuperNode",
    "deploy start": "SuperNode",
    "flwr-simulation": "simulation",
    "gcs_server": "Ray",
    "raylet": "Ray",
    "ray::": "Ray",
    "/ray/": "Ray",
    "fedlora_flwr.cli": "command",
    "deploy run": "command",
    "bin/flwr ": "Flower's command",
}
"""What a process is, by a word of its command line."""


def marked(mark: str) -> list[int]:
    """Return the processes that have a mark, in ascending order."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # It has ended meanwhile.
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def left_of(mark: str, patience: float = 60.0) -> list[int]:
    """Wait until no process has a mark; return those that have not ended in so many seconds."""
    deadline = time.monotonic() + patience
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def command_of(process: int) -> str:
    """Return a process's command line; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def by_kind(mark: str) -> dict[str, list[int]]:
    """Return the processes that have a mark, by what they are."""
    found: dict[str, list[int]] = {}
    for process in marked(mark):
        words = command_of(process)
        kind = next((kind for word, kind in KINDS.items() if word in words), "other")
        found.setdefault(kind, []).append(process)
    return found


def handles(process: int) -> list[str]:
    """Return what a process has open, sockets included; nothing if it has ended."""
    found = []
    with suppress(OSError):
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):  # It has been closed meanwhile.
                found.append(str(entry.readlink()))
    return found


def holders(folder: Path) -> list[int]:
    """Return the processes that have a file below a folder open, or work in one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            held = handles(int(entry.name))
            with suppress(OSError):
                held.append(str((entry / "cwd").readlink()))
            if any(Path(path).is_relative_to(folder) for path in held):
                found.append(int(entry.name))
    return sorted(found)
