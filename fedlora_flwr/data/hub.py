"""Whether the model and data hub can be reached, known in seconds rather than minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

# A hub that is there answers in well under a second; its client would try for minutes.
_PATIENCE = 5.0


def hub_answers() -> bool:
    """Ask the hub for a sign of life, unless ``HF_HUB_OFFLINE`` forbids it.

    An answer holds for about a minute.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _asked(int(time.monotonic() // 60))


@contextmanager
def own_copies_only(away: bool) -> Iterator[None]:
    """Keep the hub's client to the copies it has where the hub is away.

    Libraries that are told to use local files ask the hub for some of them anyway.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or away
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def _asked(minute: int) -> bool:  # noqa: ARG001 - what the cache goes by.
    # In a thread, because resolving a name has no time limit.
    answered, done = threading.Event(), threading.Event()

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        except Exception:  # noqa: S110 - any error means that there was no answer.
            pass
        else:
            answered.set()
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(_PATIENCE)
    return answered.is_set()
