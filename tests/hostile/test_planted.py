"""Devices of the package's own tasks, with a word in every place that can hold private text.

No part of the word may be in a reply. Flower 1.42 uploads the log of a ServerApp alone, so replies
are all that leaves a device; a test below notices if that changes.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from flwr.app import RecordDict
from flwr.supernode.runtime import run_clientapp
from hypothesis import given

from tests.hostile import canaries
from tests.hostile.canaries import BROKEN, CANARY, SOUND
from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device, records, start
from tests.hostile.orders import examples, order_configs, run_configs
from tests.hostile.support import ask_both
from tests.hostile.texts import own_arrays, plant

pytestmark = pytest.mark.usefixtures("counted")

# What a run might say of the data, if it could.
WRONG: list[dict[str, Any]] = [
    {}, {"num-classes": 1}, {"num-classes": 3, "class-names": ""}, {"class-names": "a,b"},
    {"label-column": f"text-{CANARY}"}, {"label-column": "label"}, {"input-columns": "no"},
    {"input-columns": f"kind-{CANARY}"}, {"train-split": f"test-{CANARY}"}, {"model": "bert"},
    {"test-split": f"train-{CANARY}", "report-unprotected-metrics": True}, {"weights": "random"},
    {"dataset-subset": "../.."}, {"partitioner": "natural-id", "partition-column": "text"},
    {"max-length": 8}, {"max-length": 1_000_000}, {"image-size": 8}, {"image-size": 4096},
    {"lora-targets": "head"}, {"lora-targets": ".*"}, {"blocks": "x"}, {"rank": 4096},
    {"batch-size": 10_000_000}, {"batch-size": 41}, {"quantization": "4bit"}, {"task": "digits"},
]  # fmt: skip


def _good(device: Device) -> dict[str, Any]:
    try:
        return own_arrays(device)
    except Exception:  # A device whose own file or model is broken has no arrays to send.
        return dict(start(4))


@pytest.mark.parametrize("name", [*SOUND, *BROKEN])
def test_no_part_of_a_planted_word_leaves(name: str, make_device: MakeDevice) -> None:
    device = plant(make_device, {**SOUND, **BROKEN}[name], **{"test-split": "named"})
    arrays = _good(device)
    assert not device.outside.wire.touched()
    for changes in WRONG:
        run = {**device.run, **changes}
        # Most configurations that a device accepts build its model again, so few are trained with.
        order = {"plan": "*"} if changes in ({}, WRONG[1], WRONG[4]) else {"plan": "*", "x": 1}
        device.ask("train", records(arrays, order), run)
    for shared in ({"share": "A"}, {}):
        device.ask("evaluate", records(arrays, shared))
    for kind in ("query", "get_parameters", "train.x", "reconnect"):
        device.ask(kind, RecordDict())
    assert device.kinds["refused"] > 5
    assert "ok" in device.kinds
    assert "failed" in device.kinds


def test_any_message_to_a_device_with_texts(make_device: MakeDevice) -> None:
    device = plant(make_device, canaries.text_lines)
    arrays = own_arrays(device)
    structural = {"rank", "lora-targets", "lora-alpha", "pooling", "max-length", "train-head"}

    @examples(300)
    @given(run_configs(device.outside.folder), order_configs())
    def sent(run: dict[str, Any], config: dict[str, Any]) -> None:
        changes = {key: run[key] for key in run if run.get(key) != RUN.get(key)}
        if not structural & {key.rpartition(".")[2] for key in changes}:
            device.ask("train", records(arrays, {**config, "x": 1}), {**device.run, **changes})
        device.ask("train", records(arrays, config))

    sent()
    assert device.sent >= 400, device.sent


@pytest.mark.parametrize("length", [8, 16, 48])
def test_a_length_tells_no_records_place_of_an_answer(make_device: MakeDevice, length: int) -> None:
    """A run chooses ``max-length``; whether any answer lies within it is the records' secret."""
    twins = tuple(
        plant(make_device, canaries.late_answers if late else canaries.prompts)
        for late in (False, True)
    )
    run = {**twins[0].run, "max-length": length}
    arrays = own_arrays(twins[0], run)
    twins[1].public = twins[0].public
    answer = ask_both(twins, "train", records(arrays, {"plan": "*"}), run)  # type: ignore[arg-type]
    assert answer.kind == "ok"


def test_the_embedded_task_is_guarded_as_well(make_device: MakeDevice) -> None:
    device = make_device(task="digits", dataset="", delta=1e-4)
    del device.own["dataset"]
    arrays = own_arrays(device)
    for number in range(3):
        order = {"plan": "*", "server-round": number}
        assert device.ask("train", records(arrays, order)).kind == "ok"
    for changes in WRONG:
        device.ask("train", records(arrays, {"x": 1}), {**device.run, **changes})
    assert len(device.rows()) == 3


def test_flower_uploads_no_log_of_a_client() -> None:
    source = inspect.getsource(run_clientapp)
    assert "log_uploader" not in source
    assert "mirror_output" not in source
