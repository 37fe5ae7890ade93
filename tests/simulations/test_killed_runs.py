"""Runs on digits, ended by SIGKILL and resumed, against a run that was left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.endings import UNTOLD
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.app import write_app
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.simulations.superlink import SimulationSuperLink
from tests.conftest import QUICK
from tests.processes.processes import MARK, marked
from tests.server.resuming import assert_same

COMMAND = (sys.executable, "-m", "fedlora_flwr.cli", "simulate")
SETTINGS = {**QUICK, "num-rounds": 3, "strategy": "la-lora", "robust": "none"}
OVERRIDES = [f"{key}={str(value).lower()}" for key, value in SETTINGS.items()]


def killed(arguments: list[str], run: Path, rounds: int, after: float) -> None:
    """Run a command; kill it some time after a round's checkpoint is there."""
    process = subprocess.Popen((*COMMAND, *arguments), stdout=subprocess.DEVNULL)
    checkpoint = run / "checkpoints" / f"round-{rounds:07d}"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(after)
    process.kill()
    process.wait()


def test_a_killed_command_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, run, draw = RunDirectory(tmp_path / "whole"), tmp_path / "run", random.Random(21)
    config = load_recipe("digits", OVERRIDES)
    run_in_process(prepare_run(config), whole, lambda _: None)

    first = [flag for line in (*OVERRIDES, f"run-dir={run}") for flag in ("-c", line)]
    killed(first, run, 1, draw.random())
    summary = run / "summary.json"
    while not summary.exists():  # Who ended without a word has another process write one.
        time.sleep(0.01)
    assert (RunDirectory(run).summary() or {})["error"] == UNTOLD
    last, _ = Checkpoints(run).last()
    # What was killed was another process: all that this one knows of it is on the disk.
    done = CliRunner().invoke(app, ["simulate", "--resume", os.path.relpath(run)])
    assert done.exit_code == 0, done.output
    told = done.output
    assert f"after round {last.round}" in told
    assert f"round {last.round + 1}/3" in told
    assert_same(whole.path, run)


@pytest.mark.flower
def test_a_run_of_flowers_command_goes_on_by_the_key(tmp_path: Path) -> None:
    whole, run = RunDirectory(tmp_path / "whole"), tmp_path / "run"
    config = load_recipe("digits", OVERRIDES)
    run_in_process(prepare_run(config), whole, lambda _: None)

    own = {"run-dir": str(run), "state-dir": str(run), "min-clients": config.num_clients}
    write_app(tmp_path / "app")
    log = (tmp_path / "log").open("w")
    with log, SimulationSuperLink(log, environment={MARK: str(tmp_path)}) as superlink:
        workers = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=1"
        for resume in ("", str(run)):
            keys = RunConfig.of(config.items(), {**own, "resume": resume}).to_toml()
            superlink.submit(tmp_path / "app", superlink.file("run.toml", keys), workers)
            if not resume:
                while not (run / "checkpoints" / "round-0000001").exists():
                    time.sleep(0.05)
                engine(str(tmp_path)).kill()
        while not superlink.log_ended:
            time.sleep(0.2)
    assert_same(whole.path, run)


def engine(mark: str) -> psutil.Process:
    """Return the process that is Flower's engine and the run's server."""
    found = [psutil.Process(pid) for pid in marked(mark)]
    (one,) = [p for p in found if any(Path(w).name == "flwr-simulation" for w in p.cmdline()[:2])]
    return one
