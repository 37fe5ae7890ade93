"""Every module of the benchmarks that is a command says what it takes, and does nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
COMMANDS = sorted(
    path.stem for path in FOLDER.glob("[!_]*.py") if "__main__" in path.read_text(encoding="utf-8")
)
RESULTS = FOLDER / "results"


def test_these_are_the_commands() -> None:
    assert COMMANDS == [
        "accounting", "accuracy_tables", "advice", "aggregation", "as_lora_scores", "attack_table",
        "attacks", "audit", "clients", "clip_shares", "deployed_sum", "engine", "learning",
        "light_nodes", "load", "long_runs", "mechanisms", "pictures", "randomness",
        "running_cluster", "skills", "soak", "started", "stock_faults", "tiny_llm", "workers",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_measures_and_writes_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["-h"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{name} [-h]")
    assert {path: path.stat().st_mtime_ns for path in RESULTS.rglob("*")} == before
