"""Short runs of `benchmarks.mechanisms`, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.mechanism_runs import GRID, QUICK, AFirst
from benchmarks.mechanisms import main
from fedlora_flwr.layout import Layout


def test_rows_of_runs_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs", "--quick", "--output", str(tmp_path)])

    rows = pd.read_csv(tmp_path / "runs.csv")
    assert rows["row"].tolist() == list(QUICK.rows)
    assert rows["accuracy"].between(0, 1).all()
    assert [len(text.split()) for text in rows["mean_error"]] == [QUICK.rounds] * 2
    curved = rows["row"].map(lambda name: GRID[name].curved)
    assert rows["top_weights"].notna().tolist() == curved.tolist() == [True, False]
    assert rows["top_weights"][0] > 0
    about = json.loads((tmp_path / "runs.json").read_text())
    assert about["command"] == "python -m benchmarks.mechanisms runs --quick"
    assert about["cpu_seconds"] > 0
    assert "| la-lora, A first |" in capsys.readouterr().out


def test_the_public_code_of_la_lora_begins_with_a() -> None:
    layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    assert str(AFirst().plan(1, layout)) == "A/B"
