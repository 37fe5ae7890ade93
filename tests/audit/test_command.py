"""``fedlora audit``: its modes, its record and picture, and where they are attached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedlora_flwr.audit.attached import SAME
from fedlora_flwr.cli import app
from tests.cli.documented import fields

# `--attach` needs a run with the same promise, so both have what both read.
PROMISE = (
    "-c",
    "device=cpu",
    "-c",
    "num-rounds=1",
    "-c",
    "epsilon=4",
    "-c",
    "num-clients=2",
)


def command(*words: str) -> Result:
    # Twenty runs are few: chance must not turn the verdict.
    sure = ["--confidence", "0.9999"] if words[0] == "audit" else []
    return CliRunner().invoke(app, [*words, *sure, *PROMISE])


@pytest.mark.parametrize(
    ("words", "mode", "canary"),
    [
        (["--runs", "20", "--records", "4"], "paired", "gradient"),
        (["--one-run", "--records", "20"], "one run", "gradient"),
        (["--black-box", "--runs", "20", "--records", "4"], "black box", "label"),
    ],
)
def test_each_mode_writes_its_record_and_says_what_it_means(
    tmp_path: Path, words: list[str], mode: str, canary: str
) -> None:
    file = tmp_path / "found.json"
    said = command("audit", "digits", *words, "--output", str(file))
    assert said.exit_code == 0, said.output
    record = json.loads(file.read_text())
    assert (record["mode"], record["canary"]) == (mode, canary)
    assert record["settings"]["num-rounds"] == 1
    assert set(record) == fields("audit")
    assert record["verdict"] in said.output
    assert f"ε = {record['claim']:.3f}" in said.output
    assert all(len(point) == 2 for point in record["curve"])
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.width > 500


def test_two_modes_at_once_are_refused() -> None:
    said = command("audit", "digits", "--one-run", "--black-box")
    assert said.exit_code != 0
    assert "one of --paired, --one-run and --black-box" in " ".join(said.output.split())


def test_a_record_is_attached_to_a_run_and_its_card(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("simulate", "digits", "-c", f"run-dir={run}", "-c", "eval-every=1")
    assert done.exit_code == 0, done.output
    before = (run / "adapter/README.md").read_text("utf-8")
    words = ("audit", "digits", "--runs", "20", "--records", "4", "--attach", str(run))
    for _ in range(2):  # The second record replaces the first.
        said = command(*words, "--output", str(tmp_path / "a.json"))
        assert said.exit_code == 0, said.output
    record, card = json.loads((run / "audit.json").read_text()), run / "adapter/README.md"
    text = card.read_text("utf-8")
    assert text.count("## Audit\n") == 1
    assert f"Verdict: {record['verdict']}." in text
    start, end = text.index("## Audit\n"), text.index("## Training\n")
    assert text[:start] + text[end:] == before
    assert f"claimed ε = {record['claim']:.2f}" in (run / "report.html").read_text("utf-8")


def test_an_audit_of_another_promise_is_not_attached(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "a.json"
    run.mkdir()
    words = ("audit", "digits", "--attach", str(run), "--output", str(output), "--runs", "20")
    said = command(*words)
    assert said.exit_code != 0
    assert "config.toml" in said.output
    (run / "config.toml").write_text('[federation]\nstrategy = "flora"\n')
    said = command(*words)
    assert said.exit_code != 0
    assert "strategy = 'rolora'" in " ".join(said.output.split())
    assert not output.exists()
    assert {"strategy", "epsilon", "trust-model"} <= set(SAME)
