"""What tests call in another process; imports next to nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fedlora_flwr.errors import InvalidValue


def who() -> int:
    """Return the process that is called."""
    return os.getpid()


def refuse(key: str) -> None:
    """Raise an error of ours."""
    raise InvalidValue(key, 1, "2")


def die() -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def stay(mark: Path) -> None:
    """Be at work for longer than anybody waits."""
    mark.touch()
    time.sleep(600)


def count_others(folder: Path) -> int:
    """Return how many calls were at work meanwhile."""
    mark = folder / str(time.monotonic_ns())
    mark.touch()
    time.sleep(0.05)
    others = len(list(folder.iterdir())) - 1
    mark.unlink()
    return others
