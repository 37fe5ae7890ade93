"""Processes of this machine: independent jobs, and children that end with their parent."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector.

    What a process imports stays, and looking through a million new objects over and over for what
    does not takes a tenth to a fifth of its start. Flower starts a process for each message, and
    Ray one for each worker.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
