"""Processes of this machine: independent jobs, and children that end with their parent."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector.

    Imported objects stay, so looking through a million of them again and again is wasted work: it
    takes a tenth to a fifth of a process's start. Flower starts a process for each message, and Ray
    starts one for each worker.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
