"""What tasks write to the screen and to logs while they read data with a word planted in it.

Errors of a task may hold private values: they stay on the device. What a device writes by itself
must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.registry import build_task, check_splits_apart, required_on_device
from tests.hostile.canaries import BROKEN, CANARY, SOUND, Planted, traces

pytestmark = pytest.mark.usefixtures("own_cache")

# What a run might say of the data, if it could.
WRONG: list[dict[str, Any]] = [
    {"num-classes": 1, "class-names": ""},
    {"num-classes": 0, "class-names": "one,two"},
    {"label-column": f"text-{CANARY}"},
    {"label-column": f"more-{CANARY}"},
    {"label-column": "label"},
    {"input-columns": f"kind-{CANARY}"},
    {"input-columns": "no"},
    {"train-split": f"test-{CANARY}"},
    {"train-split": "train"},
    {"test-split": f"train-{CANARY}"},
    {"test-split": "test"},
    {"dataset-subset": ".."},
    {"max-length": 8},
    {"max-length": 100_000},
    {"partitioner": "natural-id", "partition-column": f"text-{CANARY}"},
]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def work(planted: Planted, changes: dict[str, Any]) -> dict[str, float]:
    """Do what a device does with its records for all kinds of messages."""
    usual = {"partitioner": "iid", "min-records": 1, "max-length": 48, "device": "cpu"}
    config = RunConfig.of(usual, planted.settings, changes)
    task = build_task(config.task, config)
    model = task.build_model()
    check_splits_apart(task)
    records = task.client_records(0, 1)
    task.losses(model, records.batch(torch.arange(3))).sum().backward()  # type: ignore[no-untyped-call]
    return task.evaluate(model, task.test_records())


def said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    return "".join([*capfd.readouterr(), *(record.getMessage() for record in caplog.records)])


@pytest.mark.parametrize("name", SOUND)
def test_sound_data_is_read_and_nothing_is_said_about_it(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    planted = SOUND[name](tmp_path / "device")
    capfd.readouterr()
    found = work(planted, {})
    assert set(found) >= {"loss"}
    assert not traces(" ".join(found))
    assert not traces(said(capfd, caplog))
    for group in required_on_device(planted.settings["task"]):
        assert any(planted.settings.get(key) for key in group)


@pytest.mark.parametrize("name", SOUND)
def test_wrong_settings_are_errors_and_nothing_else_is_said(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    planted = SOUND[name](tmp_path / "device")
    capfd.readouterr()
    errors = []
    for changes in WRONG:
        try:
            found = work(planted, changes)
        except InvalidValue as error:
            errors.append(str(error))
        else:
            assert not traces(" ".join(found))
    assert not traces(said(capfd, caplog))
    # The word is where errors come from: the suites that use it would see it.
    assert any(traces(error) for error in errors)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_one_error_and_nothing_else_is_said(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    planted = BROKEN[name](tmp_path / "device")
    capfd.readouterr()
    with pytest.raises(InvalidValue) as caught:
        work(planted, {})
    assert traces(str(caught.value))
    assert not traces(said(capfd, caplog))


def test_a_trace_is_a_part_in_any_case() -> None:
    assert traces(f"x{CANARY[2:8].upper()}y") == [CANARY[2:7], CANARY[3:8]]
    assert traces(CANARY[:5].encode()) == [CANARY[:5]]
    assert not traces(CANARY[:4] + "-" + CANARY[4:8])
