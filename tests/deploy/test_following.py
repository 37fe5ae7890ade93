"""`fedlora deploy run` at a server that somebody else starts, and that dies in the run."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from benchmarks.running_fleet import RunningFleet
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import SETTINGS, Fleet, make_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import free_port
from tests.deploy.support import until
from tests.processes.processes import MARK, left_of

pytestmark = pytest.mark.deploy

ROUNDS = 3


def prepare(base: Path) -> tuple[RunningFleet, RunDirectory]:
    """Make a fleet of one device, and a recipe."""
    run = RunDirectory(base / "run")
    config = RunConfig.of({
        "task": "digits", "strategy": "la-lora", "num-rounds": ROUNDS, "num-clients": 1,
        "min-clients": 1, "local-steps": 1, "batch-size": 8, "delta": 1e-5, "device": "cpu",
        "run-dir": str(run.path),
    })  # fmt: skip
    make_fleet(base / "fleet", Fleet(1, port=free_port()), config)
    settings = base / "fleet" / "devices" / "device-01" / SETTINGS
    text = settings.read_text().replace('dataset = "data"\n', "")
    settings.write_text("reproducible = true\n" + text)
    (base / "home").mkdir()
    shutil.copy(base / "fleet" / "operator" / "connection.toml", base / "home" / "config.toml")
    (base / "recipe.toml").write_text(config.to_toml())
    return RunningFleet(base / "fleet", base / "home"), run


def operate(fleet: RunningFleet, base: Path, *more: str) -> subprocess.Popen[bytes]:
    """Type the operator's command; what it says is in ``said``."""
    command = ("fedlora", "deploy", "run", str(fleet.folder), str(base / "recipe.toml"), *more)
    env = {**fleet.env, MARK: str(base)}
    with (base / "said").open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=env)


def runs_of(fleet: RunningFleet) -> list[int]:
    """Return the runs that the server's database knows."""
    file = fleet.folder / "server" / "state.sqlite"
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db,
    ):
        return [run for (run,) in db.execute("SELECT run_id FROM run")]
    return []


def kill_server(fleet: RunningFleet) -> None:
    os.kill(fleet.processes["server"].pid, signal.SIGKILL)
    fleet.stop(["server"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("following")


@pytest.fixture(scope="module")
def running(base: Path) -> Iterator[tuple[RunningFleet, RunDirectory]]:
    """Start a fleet's server, and end all that is left of the fleet."""
    fleet, run = prepare(base)
    try:
        fleet.start("server")
        fleet.wait_for_server()
        yield fleet, run
    finally:
        left_of(str(base), patience=0.0)
        fleet.stop([name for name in list(fleet.processes) if name != "server"])
        fleet.stop(list(fleet.processes))


def test_a_run_goes_on_once_its_server_is_there_again(
    running: tuple[RunningFleet, RunDirectory], base: Path
) -> None:
    fleet, run = running
    fleet.operator(fleet.folder / "operator" / "register.sh")
    fleet.start("device-01")
    operator = operate(fleet, base, "--pause", "2")
    until(lambda: len(run.rows("rounds")) > 1)
    kill_server(fleet)
    until(lambda: "No SuperLink answers" in (base / "said").read_text())
    assert operator.poll() is None
    fleet.start("server")
    operator.wait(400)
    said, summary = (base / "said").read_text(), run.summary() or {}
    assert (summary["status"], summary["rounds_done"]) == ("completed", ROUNDS), said
    assert [row["round"] for row in run.rows("rounds")] == list(range(ROUNDS + 1))
    assert "The SuperLink is started." not in said
    assert left_of(str(base), patience=10.0) == []


def test_a_run_is_submitted_again_to_a_server_that_has_lost_its_database(
    running: tuple[RunningFleet, RunDirectory], base: Path
) -> None:
    fleet, run = running
    fleet.stop(["device-01"])
    recipe = base / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(run.path), str(base / "another run")))
    known = runs_of(fleet)
    operator = operate(fleet, base, "--pause", "3", "--restarts", "4")
    until(lambda: "Starting logstream" in (base / "said").read_text())
    before = runs_of(fleet)
    assert len(before) > len(known)
    kill_server(fleet)
    for file in (fleet.folder / "server").glob("state.sqlite*"):
        file.unlink()
    fleet.start("server")
    until(lambda: runs_of(fleet) or operator.poll() is not None)
    after = runs_of(fleet)
    operator.send_signal(signal.SIGINT)
    operator.wait(100)
    left = left_of(str(base), patience=10.0)
    said = " ".join((base / "said").read_text().split())
    assert len(after) == 1, said
    assert not {*after} & {*before}
    assert "does not know the run" in said
    assert "register.sh again, or it admits no device." in said
    assert left == []
