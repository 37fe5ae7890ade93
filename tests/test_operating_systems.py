"""The package on systems that lack what Linux has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr import operating_system

QUICK = {"num-rounds": 2, "num-clients": 3, "partitioner": "iid", "reproducible": True}


def _run(folder: Path) -> list[str]:
    changes = [f"{key}={json.dumps(value)}" for key, value in QUICK.items()]
    options = [part for change in changes for part in ("-c", change)]
    return ["simulate", "digits", "-c", f"run-dir={folder}", *options]


def _said(system: str, *commands: list[str]) -> list[dict[str, Any]]:
    """Give commands to one process, and return the exit code and the errors of each."""
    command = [sys.executable, "-m", "tests.support.other_system", system, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(commands)
    return said


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same run on this system."""
    from fedlora_flwr import simulate

    folder = tmp_path_factory.mktemp("here") / "run"
    changes: dict[str, Any] = {key.replace("-", "_"): value for key, value in QUICK.items()}
    simulate("digits", run_dir=str(folder), progress=False, **changes)
    return folder


def test_a_run_in_this_process_gives_the_same_adapter_on_macos(here: Path, tmp_path: Path) -> None:
    run, again = _said("macos", *[_run(tmp_path / "run")] * 2)
    assert "not tested on macOS" in run["errors"]
    _check(run, again, here, tmp_path / "run")


def test_windows_runs_in_this_process_alone(here: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run, again, ray, fleet = _said(
        "windows",
        *[_run(tmp_path / "run")] * 2,
        ["run", "digits", "--output", str(empty)],
        ["deploy", "init", str(empty / "fleet"), "--devices", "2"],
    )
    assert "not tested on Windows. Runs in this process" in run["errors"]
    _check(run, again, here, tmp_path / "run")
    assert ray["code"] == fleet["code"] == 1
    assert "engine = 'flower' cannot be used: expected 'process' on Windows" in ray["errors"]
    assert "Windows has no deployment" in fleet["errors"]
    assert not list(empty.iterdir())


def _check(run: dict[str, Any], again: dict[str, Any], here: Path, folder: Path) -> None:
    """See that a run gives the adapter of this system, and that a second one is refused."""
    assert run["code"] == 0, run["errors"]
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (here / weights).read_bytes()
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    assert again["code"] == 1
    assert "cannot be used" in again["errors"]


def test_a_lock_is_free_again_when_its_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    first, second = (os.open(tmp_path / "file", os.O_RDWR) for _ in range(2))
    assert operating_system.try_lock(first)
    assert not operating_system.try_lock(second)
    os.close(first)
    assert operating_system.try_lock(second)
    os.close(second)
