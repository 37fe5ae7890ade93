from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.aggregation import BARS, FULL, QUICK, swin

ROOT = Path(__file__).parents[2]


def test_layers_are_those_of_the_models() -> None:
    assert swin((2, 4), (1, 3)) == {(6, 2): 1, (2, 2): 1, (12, 4): 3, (4, 4): 3}
    assert [sum(layers.values()) for layers in FULL.models.values()] == [48, 48]


def test_a_quick_run_writes_every_figure(tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"

    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aggregation", "--quick", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert "flexlora" in run.stdout
    content = json.loads(output.read_text())
    assert content["command"] == "python -m benchmarks.aggregation --quick"
    assert str(tmp_path) not in output.read_text()
    assert content["threads"] == 1
    assert content["machine"].keys() == {"cpu", "cores"}
    assert {"numpy", "scipy", "torch", "python"} <= content["versions"].keys()
    cells = len(QUICK.clients) * len(QUICK.ranks)
    assert len(content["rows"]) == len(QUICK.models) * cells * 10
    for row in content["rows"]:
        assert 0 < row["seconds"] < 10
        assert row["ratio"] == pytest.approx(row["full_svd_seconds"] / row["seconds"])
        assert row["bar"] == BARS.get(row["strategy"])
        assert row["met"] == (None if row["bar"] is None else row["ratio"] >= row["bar"])
        assert (row["why"] is None) == (row["met"] is not False and row["ratio"] >= 1)
    streamed = [row for row in content["rows"] if "streamed" in row["strategy"]]
    kept = [row for row in content["rows"] if row["strategy"].startswith("ffa-lora")]
    # What is kept grows with the clients where uploads are, and does not where they are added up.
    assert len({(row["model"], row["rank"], row["kept_mb"]) for row in streamed}) == 4
    assert len({(row["model"], row["rank"], row["kept_mb"]) for row in kept}) == 8
    equality = content["equality"]
    assert len(equality["cells"]) == len(QUICK.shapes) * cells * 2
    assert equality["met"] is True
    for name in ("fedsvd", "flexlora", "flora", "fedex-lora"):
        assert max(cell[name] for cell in equality["cells"]) < 1e-10
