"""Imports without the garbage collector, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, gc
from fedlora_flwr.processes import uncollected

many = 100_000
# What is registered first is called last: after all that the package does at the end.
atexit.register(lambda: print("frozen", gc.get_freeze_count() > many))
with uncollected():
    kept = [[number] for number in range(many)]
    print("at work", gc.isenabled())
with uncollected():
    pass
print("afterward", gc.isenabled(), gc.get_freeze_count() > many)
"""


def test_a_process_looks_for_garbage_after_its_imports_and_not_at_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["at work False", "afterward True False", "frozen True"]
