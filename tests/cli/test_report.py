"""``fedlora report`` on folders of runs, and the split that a simulation keeps for it."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.studies.compare_results import Journal, Row


def fedlora(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def made(folder: Path, accuracy: float, **settings: object) -> Path:
    """Write the files of a run that has ended."""
    run_dir = RunDirectory(folder)
    run_dir.write_config(RunConfig(num_rounds=1, **settings))  # type: ignore[arg-type]
    for number, value in enumerate((0.5, accuracy)):
        run_dir.append("rounds", {"round": number, "accuracy": value, "seconds": 1.0})
    ended = {"status": "completed", "metric": "accuracy", "final_accuracy": accuracy}
    run_dir.write_summary(ended)
    return folder


def document(path: Path) -> str:
    return "".join(ET.fromstring(path.read_text("utf-8").split("\n", 1)[1]).itertext())


def test_a_run_has_its_report_in_its_own_folder(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 0.75)
    code, output = fedlora("report", str(run))
    assert (code, output.split()) == (0, ["Report", str(run / "report.html")])
    assert "50% → 75%" in document(run / "report.html")
    other = tmp_path / "other.html"
    assert fedlora("report", str(run), "-o", str(other))[0] == 0
    assert other.read_bytes() == (run / "report.html").read_bytes()


def test_a_report_for_others_is_a_file_of_its_own(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 0.75, dataset="/home/owner/patients")
    code, output = fedlora("report", str(run), "--public")
    assert (code, output.split()) == (0, ["Report", str(run / "report-public.html")])
    assert not (run / "report.html").exists()
    assert "50% → 75%" in document(run / "report-public.html")
    assert "patients" not in (run / "report-public.html").read_text("utf-8")
    code, output = fedlora("report", str(run), str(run), "--public")
    assert code == 1
    assert "expected the folder of one run" in " ".join(output.split())


def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [made(tmp_path / f"run-{n}", 0.7 + n / 100, seed=n) for n in range(3)]
    runs.append(made(tmp_path / "other", 0.5, strategy="ffa-lora"))
    assert fedlora("report", *map(str, runs))[0] == 0
    text = document(tmp_path / "report.html")
    assert "4 runs compared" in text
    assert "rolora371%68.5% to 73.5%" in text


def test_a_comparison_has_a_report_of_its_methods(tmp_path: Path) -> None:
    folder = tmp_path / "compare-digits"
    folder.mkdir()
    journal = Journal(folder / "rows.csv")
    row = Row({
        "phase": "report", "row": "ffa-lora", "strategy": "ffa-lora", "bytes_up": 2000,
        "bytes_down": 1, "failures": 0, "seconds": 1.0, "error": "", "lr-a": 0.5, "lr-b": 0.5,
        "lr-head": 0.5,
    })  # fmt: skip
    for epsilon in (1.0, 8.0, math.inf):
        journal.append({**row, "phase": "tune", "epsilon": epsilon, "seed": 0, "final": 0.1})
        for seed, value in ((1, 0.6), (2, 0.64)):
            journal.append({**row, "epsilon": epsilon, "seed": seed, "final": value})
    journal.append({**row, "epsilon": math.inf, "seed": 3, "error": "<out> of memory"})
    code, output = fedlora("report", str(folder))
    assert code == 0, output
    text = document(folder / "report.html")
    assert "ffa-lora1262%36.6% to 87.4%2 kB0" in text
    assert "ffa-lorano privacy262%36.6% to 87.4%2 kB1" in text
    assert "ffa-lorainf3<out> of memory" in text
    assert "privacy budget ε 8: ffa-lora 62% (36.6% to 87.4%)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "RUN = 'nowhere' cannot be used: expected the folder of a run"),
        (["run", "-o", "report.pdf"], "--output = "),
        (["run", "-o", "nowhere/report.html"], "an .html file in a folder that exists"),
    ],
)
def test_what_cannot_be_reported_is_told(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "run", 0.75)
    code, output = fedlora("report", *arguments)
    assert code == 1
    assert message in " ".join(output.split())
    assert not list(tmp_path.rglob("report.*"))


def test_a_simulation_keeps_its_split_and_names_its_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("num-rounds=1", "num-clients=2", "local-steps=1", f"run-dir={run}")
    code, output = fedlora("simulate", "digits", *(w for one in settings for w in ("-c", one)))
    assert code == 0, output
    assert f"Report {run / 'report.html'}, for a browser" in " ".join(output.split())
    split = json.loads((run / "split.json").read_text())
    inspected = fedlora("inspect-split", str(run / "config.toml"), "--json",
                        "--output", str(tmp_path / "split.png"))[1]  # fmt: skip
    assert split["clients"] == json.loads(inspected)["clients"]
    assert "How records are split" in document(run / "report.html")
