from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.strategies import STRATEGIES
from fedlora_flwr.studies.compare_results import Journal, read_rows
from tests.cli.documented import fields

ONE = ("--epsilon", "none", "--seeds", "1", "--trials", "0")
SOME = ("--epsilon", "8")  # In place of none.
ROOT = Path(__file__).parents[2]
QUICK = ("partitioner=iid", "num-clients=2", "num-rounds=1", "local-steps=1", "device=cpu")


def compare(folder: Path, *arguments: str) -> tuple[int, str]:
    """Return exit code and output of ``fedlora compare``."""
    settings = [part for pair in QUICK for part in ("-c", pair)]
    command = ["compare", "--output", str(folder), *settings, *arguments]
    result = CliRunner().invoke(app, command)
    return result.exit_code, result.output


def cells(text: str) -> dict[str, list[str]]:
    """Return the cells of a comparison's first table by row, as printed or as Markdown."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        row = re.split(r"\s*\|\s*|\s{2,}", line.strip("| "))
        if len(row) > 1 and not row[0].startswith("-"):
            found.setdefault(row[0], row[1:])
    return {name: row for name, row in found.items() if name.split(",")[0] in STRATEGIES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "la-lore"], "did you mean 'la-lora'? Expected"),
        (["--row", ""], "strategy = ''"),
        (["--row", "la-lora 'filter=ema"], '--row = "la-lora \'filter=ema"'),
        (["--row", "la-lora binomial"], "-c = 'binomial'"),
        (["--row", "la-lora filters=ema"], "did you mean 'filter'?"),
        (["--row", "la-lora filter=emo"], "did you mean 'ema'?"),
        (["--row", "la-lora lr-a=many"], "lr-a = 'many'"),
        (["--row", "la-lora epsilon=3"], "--row = 'epsilon'"),
        (["--row", "la-lora num-rounds=3"], "--row = 'num-rounds'"),
        (["--row", "dp-lora", "--row", "la-lora rank=0"], "(row 'la-lora rank=0')"),
        (["--row", "la-lora client-ranks=2"], "client-ranks = '2'"),
        (
            ["--row", "dp-lora", "--row", "ffa-lora batch-size=5000", *ONE, *SOME],
            "batch-size = 5000",
        ),
        (["--row", "dp-lora weighting=inverse-noise", "--epsilon", "8,none"], "epsilon = inf"),
        (["--row", "dp-lora", "--row", "flora lora-targets=none", *ONE], "lora-targets = 'none'"),
        (["--strategies", "ffa-lora,roloro"], "strategy = 'roloro'"),
        (["--strategies", ""], "strategy = ''"),
        (["--epsilon", "1,two"], "epsilon = 'two'"),
        (["--baselines", "heads-only", *ONE], "did you mean 'head-only'?"),
        (["--strategies", "dp-lora", "--reference", "rolora", *ONE], "reference = 'rolora'"),
        (["--epsilon", "0"], "epsilon = '0'"),
        (["--epsilon", "nan"], "epsilon = 'nan'"),
        (["--epsilon", "1,,3"], "epsilon = ''"),
        (["--task", "digit"], "recipe = 'digit'"),
        (["-c", "clip-norm=-1"], "clip-norm = -1"),
        (["-c", "clip-norms=1"], "did you mean 'clip-norm'"),
        (["-c", "seed=7"], "-c = 'seed'"),
        (["-c", "run-dir=/tmp"], "run-dir = '/tmp'"),
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
    arguments += ["--baselines", "none"]
    code, output = compare(folder, *arguments, "--trials", "0")
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("run ")]
    assert [line.split(":")[0] for line in lines] == ["run 1/2", "run 2/2"]
    assert [line.split()[3] for line in lines] == ["rolora", "ffa-lora"]
    assert cells(output) == cells((folder / "table.md").read_text())
    assert str(folder) in output
    rows = read_rows(folder / "rows.csv")
    assert rows["strategy"].tolist() == ["rolora", "ffa-lora"]
    code, output = compare(folder, *arguments, "--trials", "1")
    assert code == 1
    assert "trials = 0 (now 1)" in output
    pd.testing.assert_frame_equal(read_rows(folder / "rows.csv"), rows)


def documented(title: str) -> list[str]:
    """Return the arguments of the command that the page shows below a title."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    block = page.split(f"**{title}**")[1].split("\nfedlora compare ")[1].split("\n```")[0]
    return shlex.split(block.replace("\\\n", " "))


LAYOUTS = {
    "A main table": ["dp-lora", "ffa-lora", "rolora", "la-lora, binomial"],
    "A four-cell ablation": [
        "dp-lora, no filter",
        "dp-lora, binomial",
        "la-lora, no filter",
        "la-lora, binomial",
    ],
}


@pytest.mark.parametrize("title", LAYOUTS)
def test_each_documented_layout_is_one_command(title: str, tmp_path: Path) -> None:
    names = [*LAYOUTS[title], "head-only"]
    small = [*ONE, "--json"]
    folder = tmp_path / "layout"
    settings = [part for pair in (*QUICK, "local-steps=3") for part in ("-c", pair)]
    command = ["compare", *documented(title), *small, "--output", str(folder), *settings]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert "run 5/5" in result.stderr
    assert "1 more beside 4 runs (+25%)" in result.stderr
    assert (found["metric"], found["folder"]) == ("accuracy", str(folder))
    assert [row["row"] for row in found["rows"]] == names
    assert [row["strategy"] for row in found["rows"]] == [name.split(",")[0] for name in names]
    filters = ["binomial" if "binomial" in name else None for name in names]
    assert [row["settings"].get("filter") for row in found["rows"]] == filters
    rows = read_rows(folder / "rows.csv").set_index("row")
    assert list(rows.index) == names
    table = cells((folder / "table.md").read_text())
    for row in found["rows"]:
        assert row["mean"] == rows.loc[row["row"], "final"]
        assert table[row["row"]][0].strip("*") == f"{100 * row['mean']:.1f}"
    assert set(found) == fields("compare")
    assert found["reference"] == "head-only"
    assert found["baselines"] == {
        "names": ["no-training", "head-only", "no-privacy", "no-noise"], "runs": 1, "left_out": {}
    }  # fmt: skip
    *methods, head = found["rows"]
    for row in methods:
        gap = row["mean"] - head["mean"]
        assert row["difference"] == {
            "mean": gap, "low": None, "high": None, "seeds": 1, "told_apart": False
        }  # fmt: skip
    assert head["difference"] is None
    assert found["no_training"][0]["mean"] == rows["initial"].iloc[0]
    assert (folder / "accuracy.png").exists()


def test_failed_runs_end_in_exit_code_1(tmp_path: Path) -> None:
    arguments = ["--strategies", "ffa-lora", "--epsilon", "8", "--seeds", "1", "--trials", "0"]
    arguments += ["--baselines", "none"]
    loud = ("-c", "clip-norm=1e6", "-c", "lr-head=100")  # With noise of that size no upload fits.
    code, output = compare(tmp_path / "cmp", *arguments, *loud)
    assert code == 1
    assert "1 runs failed" in output
    assert cells(output)["ffa-lora"][0] == "failed"


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
