"""Processes of this machine: independent jobs, and children that end with their parent."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector.

    Imported objects stay, so looking through a million of them again and again is wasted work: it
    takes a tenth to a fifth of a process's start. Where torch is imported, nothing that is there
    afterward is ever looked through, which would happen once in each generation. What a process
    has before torch is small. Python would look through all once more at its end, which takes as
    long. Flower starts a process for each message, and Ray starts one for each worker.
    """
    _freeze_at_end()
    enabled, known = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not known and "torch" in sys.modules:
            gc.freeze()
        if enabled:
            gc.enable()


@cache
def _freeze_at_end() -> None:
    """Let this process end without a last search for garbage."""
    atexit.register(gc.freeze)
