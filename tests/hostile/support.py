"""What servers send to a hostile test's devices, and what they see of the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict

from tests.hostile.device import Answer, Device, records

KINDS = [
    "train", "evaluate", "query", "get_parameters", "get_properties", "reconnect", "train.custom",
    "evaluate.default", "query.who", "train.", ".train", "TRAIN", "train ", "fit", "", "system",
    "../query", "\x00", "x" * 10_000,
]  # fmt: skip


def legacy(prefix: str, arrays: dict[str, Any], config: dict[str, Any]) -> RecordDict:
    found = records(arrays, config)
    return RecordDict(
        {
            f"{prefix}.parameters": found.array_records["arrays"],
            f"{prefix}.config": found.config_records["config"],
        }
    )


def seen(answer: Answer) -> tuple[object, ...]:
    """Return what a server sees of an answer, without noise, times and numbers of errors."""
    reason = re.sub(r"error [0-9a-f]{8}", "error", answer.reason)
    arrays = [(name, values.shape) for name, values in answer.arrays.items()]
    account: dict[str, Any] = {}
    records: list[Mapping[str, Any]] = [
        *answer.content.metric_records.values(),
        *answer.content.config_records.values(),
    ]
    for record in records:
        account |= {key: value for key, value in record.items() if key not in _VARYING}
    return answer.kind, reason, arrays, sorted(account.items())


_VARYING = ("seconds", "peak-memory-mb")


def ask_both(twins: tuple[Device, Device], *args: Any, **kwargs: Any) -> Answer:
    one, other = (device.ask(*args, **kwargs) for device in twins)
    assert seen(one) == seen(other)
    return one
