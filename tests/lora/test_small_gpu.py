"""Runs on a device without fp64, such as Apple's GPUs."""

import json
import subprocess
import sys
from typing import Any

import pytest

QUICK = {"num_rounds": 2, "partitioner": "iid", "reproducible": True, "eval_every": 2}


def _run(recipe: str, *more: str, **changes: Any) -> "subprocess.CompletedProcess[str]":
    order = [recipe, json.dumps({**QUICK, **changes}), *more]
    command = [sys.executable, "-m", "tests.support.on_small_gpu", *order]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("digits", {"num_clients": 3}),
        ("digits-secure-sum", {"num_clients": 5, "dropouts": 0}),
    ],
)
def test_a_private_run_gives_the_arrays_of_the_cpu(recipe: str, changes: dict[str, Any]) -> None:
    done = _run(recipe, **changes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["apart"] < 1e-5 < 1e-3 < found["moved"]
    assert found["said"] == found["again"]


def test_norms_in_fp64_on_the_device_would_fail() -> None:
    """The device of these tests is as strict as Apple's."""
    done = _run("digits", "--unaware", num_clients=3)
    assert done.returncode
    assert "The device has no fp64" in done.stderr
