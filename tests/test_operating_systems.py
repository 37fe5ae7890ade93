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


def _fedlora(system: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.support.other_system", system, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _run(system: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    changes = [f"{key}={json.dumps(value)}" for key, value in QUICK.items()]
    options = [part for change in changes for part in ("-c", change)]
    return _fedlora(system, "simulate", "digits", "-c", f"run-dir={folder}", *options)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same run on this system."""
    from fedlora_flwr import simulate

    folder = tmp_path_factory.mktemp("here") / "run"
    changes: dict[str, Any] = {key.replace("-", "_"): value for key, value in QUICK.items()}
    simulate("digits", run_dir=str(folder), progress=False, **changes)
    return folder


@pytest.mark.parametrize(
    ("system", "said"),
    [("macos", "not tested on macOS"), ("windows", "not tested on Windows. Runs in this process")],
)
def test_a_run_in_this_process_gives_the_same_adapter(
    system: str, said: str, here: Path, tmp_path: Path
) -> None:
    done = _run(system, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (here / weights).read_bytes()
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    again = _run(system, tmp_path / "run")
    assert again.returncode == 1
    assert "cannot be used" in again.stderr


def test_windows_has_no_ray_and_no_fleet(tmp_path: Path) -> None:
    run = _fedlora("windows", "run", "digits", "--output", str(tmp_path))
    assert run.returncode == 1
    assert "engine = 'flower' cannot be used: expected 'process' on Windows" in run.stderr
    fleet = _fedlora("windows", "deploy", "init", str(tmp_path / "fleet"), "--devices", "2")
    assert fleet.returncode == 1
    assert "Windows has no deployment" in fleet.stderr
    assert not list(tmp_path.iterdir())


def test_a_lock_is_free_again_when_its_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    first, second = (os.open(tmp_path / "file", os.O_RDWR) for _ in range(2))
    assert operating_system.try_lock(first)
    assert not operating_system.try_lock(second)
    os.close(first)
    assert operating_system.try_lock(second)
    os.close(second)
