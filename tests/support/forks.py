"""A child process that begins with all that this one has in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import wraps
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds
ALONE = "FEDLORA_TEST_IN_A_PROCESS_OF_ITS_OWN"


def forked(work: Callable[[], bytes]) -> bytes:
    """Return what ``work`` returns in a forked child, which ends then."""
    reader, writer = Pipe(duplex=False)
    child = os.fork()
    if not child:
        try:
            writer.send((True, work()))
        except BaseException:
            writer.send((False, traceback.format_exc()))
        finally:
            os._exit(0)
    writer.close()
    try:
        with reader:
            assert reader.poll(PATIENCE)
            returned, made = reader.recv()
        assert returned, made
        return bytes(made)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def trains_in_forks(test: Callable[..., None]) -> Callable[..., None]:
    """Run this test in a process of its own.

    Torch refuses to train in a fork of a process that has started threads of its own, and any
    earlier test may have made it start them.
    """

    @wraps(test)
    def alone(*args: Any, **kwargs: Any) -> None:
        if os.environ.get(ALONE):
            test(*args, **kwargs)
            return
        name = os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0]
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-o", f"cache_dir={cache}"]
            environment = {**os.environ, ALONE: "1"}
            done = subprocess.run(
                [*command, name], cwd=ROOT, env=environment, capture_output=True, text=True
            )
        assert done.returncode == 0, done.stdout + done.stderr

    return alone
