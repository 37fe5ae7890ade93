from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedlora_flwr
from fedlora_flwr.cli import app
from fedlora_flwr.places import TASKS
from fedlora_flwr.tasks.registry import OPTIONAL, Task
from tests.support.readme import unactivated

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "tasks.md"
OWN = (DOCS / "how_to" / "add_a_task.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the file that the page shows."""
    code = re.search(r"```python\n# tones\.py\n(.*?)```", OWN, re.S)
    assert code
    (tmp_path / "tones.py").write_text(code[1], encoding="utf-8")
    return tmp_path


def command(verb: str) -> list[str]:
    """Return what the page types, for another verb."""
    line = re.search(r"^fedlora simulate (.*)$", OWN, re.M)
    assert line
    return [sys.executable, "-m", "fedlora_flwr.cli", verb, *line[1].split(), "-c", "device=cpu"]


def test_the_documented_task_learns(folder: Path) -> None:
    done = subprocess.run(
        [*command("simulate"), "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["task"] == "tones:Tones"
    assert summary["initial_accuracy"] < 0.7
    assert summary["final_accuracy"] > 0.95
    assert 7.9 < summary["epsilon_max"] <= 8


@pytest.mark.flower
def test_the_documented_command_runs_on_flower(folder: Path) -> None:
    rounds = ["-c", "num-rounds=2", "--workers", "1", "--json"]
    done = subprocess.run(
        [*command("run"), *rounds],
        cwd=folder, env=unactivated(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds_done"] == 2


def test_the_command_on_the_page_says_what_every_task_takes() -> None:
    assert "`fedlora keys task`" in PAGE.read_text(encoding="utf-8")
    said = " ".join(CliRunner().invoke(app, ["keys", "task"]).output.split())
    assert all(f"{name}: {task.about}" in said for name, task in TASKS.items())


def test_the_page_lists_what_a_task_may_have_beside_its_nine_members() -> None:
    own = [name for name in vars(Task) if not name.startswith("_")]
    own += [name for name in Task.__annotations__ if name not in own]
    assert len(own) == 9
    assert all(f"`{name}(" in OWN for name in OPTIONAL)


def test_a_member_of_a_task_is_asked_for_in_one_place() -> None:
    package = Path(fedlora_flwr.__file__).parent
    asked = [p.name for p in package.rglob("*.py") if "getattr(task" in p.read_text("utf-8")]
    assert asked == ["registry.py"]
