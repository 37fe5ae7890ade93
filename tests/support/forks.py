"""A child process that begins with all that this one has in memory."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import cache, wraps
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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


_FORKING: defaultdict[str, list[str]] = defaultdict(list)


def trains_in_forks(test: Callable[..., None]) -> Callable[..., None]:
    """Run this test, and all others of its file that say so, in one process of their own.

    Torch refuses to train in a fork of a process that has started threads of its own, and any
    earlier test may have made it start them.
    """
    file = inspect.getfile(test)
    _FORKING[file].append(test.__name__)

    @wraps(test)
    def alone(*args: Any, **kwargs: Any) -> None:
        if os.environ.get(ALONE):
            test(*args, **kwargs)
            return
        outcomes, said = _outcomes(file)
        name = os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0].partition("::")[2]
        assert outcomes.get(name) == "passed", said

    return alone


@cache
def _outcomes(file: str) -> tuple[dict[str, str], str]:
    """Return how each such test of a file ends, and all that was printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "0", "-o", f"cache_dir={folder}", f"--junitxml={report}"]
        names = [f"{file}::{name}" for name in _FORKING[file]]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *names],
            cwd=ROOT,
            env={**os.environ, ALONE: "1"},
            capture_output=True,
            text=True,
        )
        tests = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        ended = {str(test.get("name")): "".join(c.tag for c in test) or "passed" for test in tests}
    return ended, done.stdout + done.stderr
