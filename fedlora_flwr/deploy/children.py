"""A process that ends with its SuperExec, which Flower's programs do not notice the death of."""

from __future__ import annotations

import os
import signal
import threading
import time
from logging import ERROR

_INTERVAL = 1.0  # seconds; what is seen twice did not end by itself a moment ago


def end_with_children(what: str, *, killed: bool = False) -> None:
    """End this process when a child of it has ended, as a signal from outside would.

    Parameters
    ----------
    what : str
        The sentence for the log.
    killed : bool (default: False)
        Whether only a child counts that was killed, and none that has ended by itself.
    """
    if hasattr(os, "waitid"):
        threading.Thread(target=_watch, args=(what, killed), daemon=True).start()


def _watch(what: str, killed: bool) -> None:
    before = 0
    while True:
        time.sleep(_INTERVAL)
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            ended = None  # No child was started yet.
        if killed and ended is not None and ended.si_code == os.CLD_EXITED:
            return
        if ended is not None and ended.si_pid == before:
            from flwr.common.logger import log

            log(ERROR, what)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        before = ended.si_pid if ended is not None else 0
