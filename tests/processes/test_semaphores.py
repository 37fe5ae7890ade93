"""A pool's semaphores are gone after a kill of the process, and of what would remove them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.marked import command_of
from tests.processes.processes import MARK, left_of, marked

SHARED_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="semaphores are files on Linux")

PARENT = """
import sys
from pathlib import Path
from fedlora_flwr.processes.workers import executor
from tests.processes.counting import slow

with executor(2, Path(sys.argv[1]) / "log") as execute:
    for _ in execute(slow, [0.0, 0.0, 600.0, 600.0]):
        print("done", flush=True)
"""


def semaphores_of(process: int) -> set[Path]:
    """Return the files of the semaphores that a process holds."""
    maps = Path(f"/proc/{process}/maps").read_text().split()
    return {Path(word) for word in maps if word.startswith(f"{SHARED_MEMORY}/sem.")}


@pytest.mark.parametrize("tracker_too", [False, True], ids=["command", "tracker and command"])
def test_no_semaphore_outlives_a_killed_command(tmp_path: Path, tracker_too: bool) -> None:
    mark = str(tmp_path)
    command = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, MARK: mark},
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"done\n"
    held = semaphores_of(command.pid)
    assert held
    if tracker_too:
        (tracker,) = (p for p in marked(mark) if "resource_tracker" in command_of(p))
        os.kill(tracker, signal.SIGKILL)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert left_of(mark, patience=60) == []
    deadline = time.monotonic() + 20
    while any(file.exists() for file in held) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [file for file in held if file.exists()] == []
