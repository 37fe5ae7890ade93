from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.tasks.dataset_task import DatasetTask
from fedlora_flwr.tasks.digits import DigitsTask
from tests.hostile.device import RUN, Device, Outside
from tests.hostile.tiny_task import READS

MakeDevice = Callable[..., Device]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    """Lay bait beside the device's folder, where Python would find modules."""
    found = Outside(tmp_path / "outside")
    monkeypatch.syspath_prepend(str(found.modules))
    found.wire.touched()
    yield found
    found.wire.close()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the records of the package's own tasks count their readers, as the tiny task's do."""
    for task in (DatasetTask, DigitsTask):
        monkeypatch.setattr(task, "client_records", _counting(task.client_records))


def _counting(opens: Callable[..., Any]) -> Callable[..., Any]:
    def client_records(*args: Any) -> Any:
        READS.opened += 1
        return _Counting(opens(*args))

    return client_records


class _Counting:
    def __init__(self, records: Any) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def batch(self, indices: Any) -> Any:
        READS.batches += 1
        for call in READS.on_batch:
            call()
        return self._records.batch(indices)


@pytest.fixture
def make_device(tmp_path: Path, outside: Outside) -> MakeDevice:
    """Return a function that sets up a device; arguments are lines of its file."""
    numbers = itertools.count()

    def make(**settings: Any) -> Device:
        return Device(tmp_path / f"device-{next(numbers)}", outside, **settings)

    return make


@pytest.fixture
def device(make_device: MakeDevice) -> Device:
    return make_device()


@pytest.fixture
def spent(device: Device) -> Device:
    """Return a device whose budget is spent: it reads a good order to its end, and stops there."""
    for number in range(RUN["num-rounds"]):
        assert device.ask("train", device.order(server_round=number, plan="*")).kind == "ok"
    assert device.ask("train", device.order(plan="*")).kind == "budget-exhausted"
    assert device.ask("train", device.order()).kind == "exhausted"
    return device
