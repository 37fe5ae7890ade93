from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.examples.projects import accuracies, copy_of


def train(name: str, folder: Path) -> str:
    """Run an example's script as its user would; return what it printed."""
    script = copy_of(name, folder) / "train.py"
    command = [sys.executable, str(script), str(folder / "output")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_module_and_a_table_become_a_private_adapter(tmp_path: Path) -> None:
    printed = train("from_python", tmp_path)
    rows = re.findall(r"^ +(\d+) +(\S+) +(\S+)$", printed, re.M)
    assert [int(number) for number, *_ in rows] == [*range(11)]
    assert float(rows[-1][1]) > float(rows[0][1]) + 0.3
    assert 7.9 < float(rows[-1][2]) <= 8
    folder = Path(printed.rpartition("adapter: ")[2].strip())
    assert (folder / "adapter_model.safetensors").exists()


def test_the_call_from_a_module_to_an_adapter_is_twenty_lines_long() -> None:
    text = (Path(__file__).parents[2] / "examples/from_python/train.py").read_text("utf-8")
    own = text[text.index("task = TableTask(") :].strip().splitlines()
    assert len(own) <= 20


def test_a_strategy_runs_on_a_local_grid(tmp_path: Path) -> None:
    found = accuracies(train("local_grid", tmp_path))
    assert len(found) == 4
    assert found[-1] > found[0] + 0.1
    assert (tmp_path / "output" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "output" / "ledger.sqlite").exists()
