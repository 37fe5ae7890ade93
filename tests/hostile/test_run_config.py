"""A run's configuration: every key at the ends of its range and outside, alone and together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device
from tests.hostile.orders import at_the_limits, examples, run_configs

# Values at the ends of what a server may choose, for keys that do not change the noise. A round is
# trained with each.
_ENDS: dict[str, list[Any]] = {
    "clip-norm": [1e-6, 1e6], "lr-a": [0.0, 1e4], "lr-b": [0.0, 1e4], "lr-head": [0.0, 1e4],
    "momentum": [0.999], "weight-decay": [0.0, 1e3], "rank": [1, 64], "lora-alpha": [1e-3, 1e5],
    "lora-dropout": [0.999], "rslora": [True], "train-head": [False], "optimizer": ["adamw"],
    "filter": ["binomial", "laplacian", "ema", "doppler"], "seed": [0, 2**63 - 1],
    "backbone-dropout": [False], "precision": ["bf16"], "lora-targets": [r"blocks\.0\.fc"],
    "blocks": [r"blocks\.\d+"], "pooling": ["mean"], "max-length": [8], "image-size": [4096],
}  # fmt: skip
TRAINED: list[dict[str, Any]] = [{key: value} for key in _ENDS for value in _ENDS[key]] + [
    {"precondition": True, "ridge": 0.0}, {"precondition": True, "ridge": 1e6},
    {"lr-a": 1e4, "lr-b": 1e4, "lr-head": 1e4, "momentum": 0.999, "weight-decay": 1e3},
    {"optimizer": "adamw", "lr-a": 1e4, "lr-b": 1e4, "weight-decay": 1e3},
    {"clip-norm": 1e6, "lora-alpha": 1e5, "rank": 1, "lr-a": 1e4, "lr-b": 1e4},
    {"clip-weight-a": 1e3, "clip-weight-b": 1e-3}, {"clip-weight-head": 1e-3, "lr-head": 1e4},
]  # fmt: skip


def test_each_key_at_its_limits_and_outside(device: Device) -> None:
    content = device.order(unknown=1)
    for key, value in at_the_limits(device.outside.folder):
        answer = device.ask("train", content, {**RUN, key: value})
        assert answer.kind in ("refused", "failed"), (key, value)
        if device.sent % 20 == 0:
            device.ask("query", RecordDict(), {**RUN, key: value})
    assert device.sent >= 4_000, device.sent
    assert not device.rows()


def test_keys_together_left_out_and_unknown(device: Device) -> None:
    content = device.order(unknown=1)

    @examples(1_200)
    @given(run_configs(device.outside.folder), st.sampled_from(["train", "evaluate"]))
    def sent(run: dict[str, Any], kind: str) -> None:
        assert device.ask(kind, content, run).kind in ("refused", "failed")

    sent()
    assert device.sent >= 1_200, device.sent
    assert device.kinds["refused"] > 900
    assert not device.rows()


def test_values_at_the_ends_of_their_range_train_with_noise(make_device: MakeDevice) -> None:
    device = make_device(ledger_scope="run")
    for number, changes in enumerate(TRAINED):
        rank = changes.get("rank", RUN["rank"])
        content = device.order(_arrays(changes, rank), server_round=1, plan="*")
        answer = device.ask("train", content, {**RUN, **changes}, run_id=100 + number)
        # What has grown beyond the limit of an upload stays on the device, and is counted.
        assert answer.kind in ("ok", "failed"), (changes, answer)
    assert len(device.rows()) == len(TRAINED)
    assert device.kinds["ok"] >= 25


def _arrays(changes: dict[str, Any], rank: int) -> dict[str, Any]:
    from tests.hostile.device import start

    arrays = start(rank)
    if not changes.get("train-head", True):
        arrays = {name: values for name, values in arrays.items() if "head" not in name}
    if "lora-targets" in changes:
        arrays = {name: values for name, values in arrays.items() if "blocks.1" not in name}
    return arrays


@pytest.mark.parametrize("limit", [{"rank": 4}, {"lr-a": [0.1, 0.5]}, {"precision": ["fp32"]}])
def test_a_limit_of_the_device_holds_and_is_told(
    make_device: MakeDevice, limit: dict[str, Any]
) -> None:
    device = make_device(limits=limit)
    beyond = {"rank": 5, "lr-a": 0.6, "precision": "bf16"}
    key = next(iter(limit))
    answer = device.ask("train", device.order(), {**RUN, key: beyond[key]})
    assert answer.kind == "refused"
    assert key in answer.reason
    # What else the file says is not told, and no other key is limited.
    counted = itertools.count()
    for other, value in beyond.items():
        if other != key:
            answer = device.ask("train", device.order(unknown=next(counted)), {**RUN, other: value})
            assert "'unknown'" in answer.reason
