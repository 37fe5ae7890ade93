"""Runs on a device without fp64, such as Apple's GPUs."""

import json
import subprocess
import sys
from typing import Any

import pytest

QUICK = {"num_rounds": 2, "partitioner": "iid", "reproducible": True, "eval_every": 2}
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("digits", {"num_clients": 3}),
    ("digits-secure-sum", {"num_clients": 5, "dropouts": 0}),
)


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """Make all runs in one process; the last is one that does not know what the device lacks."""
    order = json.dumps([[recipe, {**QUICK, **changes}] for recipe, changes in RUNS])
    command = [sys.executable, "-m", "tests.support.on_small_gpu", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-1 - len(RUNS) :]]


@pytest.mark.parametrize("place", range(len(RUNS)), ids=[recipe for recipe, _ in RUNS])
def test_a_private_run_gives_the_arrays_of_the_cpu(place: int, lines: list[dict[str, Any]]) -> None:
    found = lines[place]
    assert found["apart"] < 1e-5 < 1e-3 < found["moved"]
    assert found["said"] == found["again"]


def test_norms_in_fp64_on_the_device_would_fail(lines: list[dict[str, Any]]) -> None:
    """The device of these tests is as strict as Apple's."""
    assert "The device has no fp64" in lines[-1]["unaware"]
