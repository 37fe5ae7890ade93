from __future__ import annotations

import subprocess
import sys

import pytest

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.registry import Task, build_task, task_names
from tests.tasks.conftest import settings


def test_a_task_is_built_by_name() -> None:
    built: Task = build_task("digits", settings())

    assert isinstance(built, DigitsTask)
    assert built.name in task_names()


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'digits'"):
        build_task("digit", settings())


def test_reading_the_registry_does_not_load_torch() -> None:
    program = "import sys, fedlora_flwr.tasks.registry; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "False"
