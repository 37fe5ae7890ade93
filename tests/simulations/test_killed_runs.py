"""`fedlora simulate` on digits, ended by SIGKILL and resumed, against a run that was left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.endings import UNTOLD
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import QUICK
from tests.server.resuming import assert_same

COMMAND = (sys.executable, "-m", "fedlora_flwr.cli", "simulate")
SETTINGS = {**QUICK, "num-rounds": 3, "strategy": "la-lora"}
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
