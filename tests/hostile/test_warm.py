"""A device that keeps its process: messages cross a socket, and no error gains words on the way."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device, records, start
from tests.hostile.recorder import Recorder


@pytest.fixture
def warm(make_device: MakeDevice) -> Device:
    device = make_device(keep_warm=5.0)
    device.warm = True
    return device


def test_a_warm_process_answers_in_the_same_words(warm: Device) -> None:
    for number in range(RUN["num-rounds"]):
        answer = warm.ask("train", warm.order(server_round=number, plan="*"))
        assert answer.kind == "ok"
    assert warm.ask("train", warm.order(plan="*")).kind == "budget-exhausted"
    assert warm.ask("train", warm.order()).kind == "exhausted"
    for config in ({"x": 1}, {"plan": "ABA"}, {"plan": [1]}, {"array-names": "a"}):
        assert warm.ask("train", records(start(4), config)).kind == "refused"
    for key, value in (("task", "bait_task:make"), ("clip-norm", 1e300), ("rank", "4")):
        assert warm.ask("train", warm.order(plan="*"), {**RUN, key: value}).kind == "refused"
    assert warm.ask("train.x", warm.order()).kind == "failed"
    assert len(warm.rows()) == RUN["num-rounds"]


def test_the_recorder_hears_what_it_should(device: Device) -> None:
    """The checks from outside would see a device that reads, runs or connects."""
    import socket
    import subprocess
    import sys

    with Recorder.of_process().recording() as events:
        (device.outside.folder / "train.jsonl").read_text()
        subprocess.run([sys.executable, "-c", ""], check=True)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", 9))
    assert {kind for kind, _, _ in events} >= {"open", "subprocess.Popen", "socket.connect"}
    for event in events:
        if event[0] in ("open", "subprocess.Popen", "socket.connect") and "outside" in str(event):
            with pytest.raises(AssertionError):
                device._check_events([event])
    assert device.outside.wire.touched()
