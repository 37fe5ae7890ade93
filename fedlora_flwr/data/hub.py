"""A check within seconds whether the model and data hub can be reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

# Seconds. A reachable hub answers in well under 1 s; its client would retry for minutes.
_PATIENCE = 5.0


def hub_answers() -> bool:
    """Return whether the hub answers a request; ``False`` if ``HF_HUB_OFFLINE`` is set.

    The result is cached for up to a minute.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _asked(int(time.monotonic() // 60))


@contextmanager
def own_copies_only(away: bool) -> Iterator[None]:
    """Make the hub's client use only its local copies if the hub is ``away``.

    Some libraries ask the hub for files even if they are told to use local ones.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or away
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@lru_cache(maxsize=1)
def _asked(minute: int) -> bool:  # noqa: ARG001 - the key of the cache.
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
