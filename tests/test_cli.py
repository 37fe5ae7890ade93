from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.simulations.compare_results import Journal, read_rows

QUICK = ("partitioner=iid", "num-clients=2", "num-rounds=1", "local-steps=1", "device=cpu")


def compare(folder: Path, *arguments: str) -> tuple[int, str]:
    """Return exit code and output of ``fedlora compare``."""
    settings = [part for pair in QUICK for part in ("-c", pair)]
    command = ["compare", "--output", str(folder), *settings, *arguments]
    result = CliRunner().invoke(app, command)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "ffa-lora,roloro"], "strategy = 'roloro'"),
        (["--strategies", ""], "strategy = ''"),
        (["--epsilon", "1,two"], "epsilon = 'two'"),
        (["--epsilon", "0"], "epsilon = '0'"),
        (["--epsilon", "nan"], "epsilon = 'nan'"),
        (["--epsilon", "1,,3"], "epsilon = ''"),
        (["--task", "digit"], "recipe = 'digit'"),
        (["-c", "clip-norm=-1"], "clip-norm = -1"),
        (["-c", "clip-norms=1"], "did you mean 'clip-norm'"),
        (["-c", "seed=7"], "-c = 'seed'"),
        (["-c", "run-dir=/tmp"], "-c = 'run-dir'"),
        (["-c", "batch-size=5000"], "batch-size = 5000"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    code, output = compare(tmp_path / "new", *arguments)
    assert code == 1
    assert output.startswith("Error: ")
    assert len(output.splitlines()) == 1
    assert message in output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--seeds", "--trials", "--workers"])
def test_counts_that_make_no_sense_are_usage_errors(option: str, tmp_path: Path) -> None:
    code, output = compare(tmp_path / "new", option, "-1")
    assert code == 2
    assert option in output
    assert not (tmp_path / "new").exists()


def test_a_comparison_prints_each_run_and_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "cmp"
    arguments = ["--strategies", "rolora,ffa-lora,rolora", "--epsilon", "none", "--seeds", "1"]
    code, output = compare(folder, *arguments, "--trials", "0")
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("run ")]
    assert [line.split(":")[0] for line in lines] == ["run 1/2", "run 2/2"]
    assert [line.split()[3] for line in lines] == ["rolora", "ffa-lora"]
    assert (folder / "table.md").read_text() in output
    assert str(folder) in output
    rows = read_rows(folder / "rows.csv")
    assert rows["strategy"].tolist() == ["rolora", "ffa-lora"]
    code, output = compare(folder, *arguments, "--trials", "1")
    assert code == 1
    assert "trials = 0 (now 1)" in output
    pd.testing.assert_frame_equal(read_rows(folder / "rows.csv"), rows)


def test_failed_runs_end_in_exit_code_1(tmp_path: Path) -> None:
    arguments = ["--strategies", "ffa-lora", "--epsilon", "8", "--seeds", "1", "--trials", "0"]
    loud = ("-c", "clip-norm=1e6", "-c", "lr-head=100")  # With noise of that size no upload fits.
    code, output = compare(tmp_path / "cmp", *arguments, *loud)
    assert code == 1
    assert "1 runs failed" in output
    assert "| failed" in output


def test_an_interrupt_leaves_files_that_can_be_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    command = [sys.executable, "-m", "fedlora_flwr.cli", "compare", "--strategies", "ffa-lora"]
    command += ["--epsilon", "none", "--seeds", "50", "--trials", "0", "--output", str(folder)]
    command += [part for pair in QUICK for part in ("-c", pair)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    rows = folder / "rows.csv"
    while process.poll() is None and not (rows.exists() and len(read_rows(rows))):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert b"Interrupted." in process.communicate()[1]
    assert process.returncode == 130
    kept = Journal(rows).rows
    assert 1 <= len(kept) < 50
    assert all(row["final"] > 0.5 for row in kept.values())
    assert not (folder / "table.md").exists()
