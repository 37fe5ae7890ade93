from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tests.examples.projects import copy_of


def test_the_script_trains_privately_and_saves_an_adapter(tmp_path: Path) -> None:
    folder = copy_of("hf_trainer", tmp_path)
    command = [sys.executable, str(folder / "train.py"), str(tmp_path / "output")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"accuracy (\S+) -> (\S+), spent: ε = 7\.99", done.stdout)
    assert found is not None, done.stdout
    assert float(found[2]) > float(found[1]) + 0.3
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()
    assert (tmp_path / "output" / "checkpoint-80" / "trainer_state.json").exists()
    with closing(sqlite3.connect(tmp_path / "output" / "ledger.sqlite")) as db:
        assert db.execute("SELECT SUM(steps) FROM releases").fetchone() == (88,)
