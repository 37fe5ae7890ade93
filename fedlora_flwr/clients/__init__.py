"""What runs on a client: local private training and its Flower client."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector.

    Flower starts a process for each message. What it imports stays, and looking through a million
    new objects over and over for what does not takes about a tenth of its start.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
