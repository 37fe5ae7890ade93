"""A small process that waits until another one is gone, and then clears up after it.

It is a script that imports only Python's own modules, so it starts in milliseconds and little can
fail. `fedlora_flwr.processes.lifeline` starts it. Its standard input is a pipe, which the kernel
closes when the process at the other end ends, for any reason.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"
_PATIENCE = 30.0  # seconds for processes that the kernel does not end at once
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36
_ENDING = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def main(order: dict[str, Any]) -> int:
    """Keep a command until it ends, or until the pipe at standard input closes.

    Parameters
    ----------
    order : dict
        ``command`` is a list of arguments, which may be empty. ``clear`` is a folder to remove at
        the end. ``last_words`` is a path and a text: at the end the text is written to this file,
        unless the file exists.

    Returns
    -------
    int
        The command's exit code.
    """
    for sign in _ENDING:  # The keeper must not end before the process that started it.
        signal.signal(sign, signal.SIG_IGN)
    if LINUX:
        # Processes that lose their parent, as daemons do, become children of this one.
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = _start(order["command"]) if order["command"] else None
    code = _wait(child)
    if child is not None:
        _end_all(child)
    if order["clear"]:
        shutil.rmtree(order["clear"], ignore_errors=True)
    if order["last_words"]:
        with suppress(OSError):  # No process is left that could be told of an error.
            _say(*order["last_words"])
    return code


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        for sign in _ENDING:
            signal.signal(sign, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if LINUX:
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _wait(child: int | None) -> int:
    """Wait for the command, or for the pipe to close; return the exit code."""
    if child is None:
        while os.read(0, 4096):
            pass
        return 0
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        if (code := _reaped().get(child)) is not None:
            return code
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        if 0 in ready and not os.read(0, 4096):
            return 128 + signal.SIGKILL


def _reaped() -> dict[int, int]:
    """Return the exit codes of children that have ended."""
    found: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return found


def _end_all(child: int) -> None:
    """End the command and all processes that it started, without giving them time to finish."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while (found := _descendants()) and time.monotonic() < deadline:
        for process in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        _reaped()
        time.sleep(0.01)


def _descendants() -> list[int]:
    """Return all processes below this one; without ``/proc``, its children at most."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir() if LINUX else ():
        if entry.name.isdigit():
            with suppress(OSError):
                # The name in brackets may contain brackets and blanks itself.
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                parents[int(entry.name)] = int(state[1])
    found: list[int] = []
    last = {os.getpid()}
    while last:
        last = {process for process, parent in parents.items() if parent in last}
        found += last
    return found


def _say(path: str, text: str) -> None:
    target, draft = Path(path), Path(f"{path}.{os.getpid()}")
    if not target.exists():
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
