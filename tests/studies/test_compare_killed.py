"""A comparison that the system kills without warning continues where it was."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.studies.compare_results import KEY, read_rows

QUICK = ("partitioner=iid", "num-clients=2", "num-rounds=1", "local-steps=1", "device=cpu")
SEEDS = 4
RUNS = 2 * SEEDS  # One row and head-only, at one ε.


def command(folder: Path) -> list[str]:
    settings = [part for pair in (*QUICK, "reproducible=true") for part in ("-c", pair)]
    options = ["--epsilon", "8", "--seeds", str(SEEDS), "--trials", "0", "--output", str(folder)]
    return ["compare", "--strategies", "ffa-lora", *options, *settings]


def test_a_killed_comparison_repeats_nothing_that_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    rows = folder / "rows.csv"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora_flwr.cli", *command(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (rows.exists() and len(read_rows(rows)) >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = read_rows(rows)
    assert 2 <= len(kept) < RUNS
    assert not (folder / "table.md").exists()
    with rows.open("a") as file:  # As if the kill had come in the middle of a line.
        file.write("report,ffa-lora,8.0")

    result = CliRunner().invoke(app, command(folder))
    assert result.exit_code == 0, result.output
    assert "no-training, head-only: 4 more beside 4 runs (+100%)" in result.output
    counted = [int(n) for n in re.findall(rf"run (\d+)/{RUNS}:", result.output)]
    assert counted == list(range(len(kept) + 1, RUNS + 1))
    found = read_rows(rows)
    pd.testing.assert_frame_equal(found.head(len(kept)), kept)  # Even the seconds are the same.
    assert len(found) == len(found.drop_duplicates(list(KEY))) == RUNS
    assert "Difference from head-only" in (folder / "table.md").read_text()
