from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import TensorRecords, lengths_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import TASKS
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.registry import Task, build_task
from tests.tasks.fixtures import settings

ROOT = Path(__file__).parents[2]


def test_a_task_is_built_by_name() -> None:
    built: Task = build_task("digits", settings())

    assert isinstance(built, DigitsTask)
    assert built.name in TASKS


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'digits'"):
        build_task("digit", settings())


def test_reading_the_registry_does_not_load_torch() -> None:
    program = "import sys, fedlora_flwr.tasks.registry; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "False"


OWN = """
from types import SimpleNamespace
from fedlora_flwr.tasks.digits import DigitsTask

class Mine(DigitsTask):
    name = "mine"

def made(settings):
    return Mine(settings)

def nothing(settings):
    return None

def half(settings):
    return SimpleNamespace(build_model=None, losses=None)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that commands run in, with modules of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {
        "own_task.py": OWN,
        "inner/deep_task.py": OWN,
        "broken_needs.py": "import a_module_that_is_not_there",
        "broken_alike.py": "import broken_alik",
        "broken_attribute.py": "import sys\nsys.not_there",
        "broken_value.py": "int('x')",
        "broken_syntax.py": "def (",
    }
    (tmp_path / "inner").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "place", ["own_task:Mine", "own_task:made", "inner.deep_task:made", "inner.deep_task:Mine"]
)
def test_a_task_of_the_users_own_is_found_beside_their_files(folder: Path, place: str) -> None:
    given = settings()
    built: Task = build_task(place, given)
    assert built.name == "mine"
    assert vars(built)["_settings"] is given
    assert sys.path.count(str(folder)) == 1
    build_task(place, given)
    assert sys.path.count(str(folder)) == 1
    # What is installed comes first.
    assert sys.path[-1] == str(folder)


def test_a_task_of_the_package_makes_no_module_of_what_lies_around(folder: Path) -> None:
    build_task("digits", settings())
    assert str(folder) not in sys.path


@pytest.mark.parametrize("place", ["own_task:Mine", "digits"])
def test_where_python_looks_at_installed_code_alone_it_stays_so(folder: Path, place: str) -> None:
    code = (
        "import sys; from types import SimpleNamespace\n"
        "from fedlora_flwr.errors import InvalidValue\n"
        "from fedlora_flwr.tasks.registry import build_task\n"
        "try: build_task(sys.argv[1], SimpleNamespace())\n"
        "except InvalidValue as error: print(error)\n"
        "print(sys.argv[2] in sys.path)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, place, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *said, found = done.stdout.splitlines()
    assert found == "False"
    if place != "digits":
        assert "not a module that is installed or on PYTHONPATH" in said[0]


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("no_such_module:made", "'no_such_module' is not a module in"),
        ("inner.missing:made", "'inner.missing' is not a module in"),
        ("missing.deep_task:made", "'missing.deep_task' is not a module in"),
        ("own_task:mad", "'own_task' has no 'mad'"),
        ("own_task:number", "where calling it returns a task"),
        ("own_task:nothing", "a NoneType without"),
        ("own_task:half", r"a SimpleNamespace without client_records, test_records, "),
        ("own_task:", "or your own module:function"),
        (":made", "or your own module:function"),
        (".own_task:made", "or your own module:function"),
        ("own_task:made:twice", "or your own module:function"),
        ("own_task", "or your own module:function"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_place_without_a_task_is_one_error(place: str, allowed: str) -> None:
    with pytest.raises(InvalidValue, match=allowed) as caught:
        build_task(place, settings())
    assert (caught.value.key, caught.value.value) == ("task", place)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("broken_needs", ModuleNotFoundError),
        ("broken_alike", ModuleNotFoundError),
        ("broken_attribute", AttributeError),
        ("broken_value", ValueError),
        ("broken_syntax", SyntaxError),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_error_in_the_users_module_is_theirs_to_see(module: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        build_task(f"{module}:made", settings())
    assert not isinstance(caught.value, InvalidValue)


def test_records_may_say_how_long_they_are() -> None:
    class Lengthy(TensorRecords):
        lengths = np.array([5, 3, 8])

    tensors = {"x": torch.zeros(3)}
    found = lengths_of(Lengthy(tensors), torch.tensor([2, 0]))
    assert found is not None
    assert found.tolist() == [8, 5]
    assert lengths_of(TensorRecords(tensors), torch.tensor([2])) is None


@pytest.mark.parametrize("takes", ["self", "self, settings", "self, settings=None", "self, *any"])
def test_a_task_takes_the_settings_or_nothing(
    takes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"taken{abs(hash(takes))}"
    (tmp_path / f"{name}.py").write_text(
        "from fedlora_flwr.tasks.digits import DigitsTask\n"
        f"class Mine(DigitsTask):\n    def __init__({takes}):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_task(f"{name}:Mine", RunConfig()).metric == "accuracy"


def test_a_task_that_takes_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy.py").write_text("def mine(settings, more): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidValue, match=r"takes the settings or nothing.*\(settings, more\)"):
        build_task("greedy:mine", RunConfig())
