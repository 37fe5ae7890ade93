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

WITH_TORCH = """
import gc, weakref
from fedlora_flwr.processes import uncollected

class Node: pass

def circle():
    node = Node()
    node.self = node
    return weakref.ref(node)

with uncollected():
    import torch
frozen = gc.get_freeze_count()
with uncollected():
    import json
print(frozen > 50_000, gc.get_freeze_count() == frozen, gc.isenabled())
later = circle()
gc.collect()
print("collected", later() is None)
"""


def test_what_torch_brings_is_never_looked_through_and_what_comes_later_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_TORCH], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True True True", "collected True"]


def test_a_process_looks_for_garbage_after_its_imports_and_not_at_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["at work False", "afterward True False", "frozen True"]
