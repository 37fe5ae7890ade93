"""Two devices that differ in their records alone must refuse, fail and end alike.

What a server can tell from errors is then nothing that depends on a record.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, records, start
from tests.hostile.orders import examples, hostile_arrays, order_configs, run_configs
from tests.hostile.support import KINDS, ask_both, seen
from tests.hostile.tiny_task import FEATURES, RECORDS, points

Values = dict[str, Any]


def strange_points() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return as many points as usual, of one class, huge, tiny, and one that is no number."""
    table = np.zeros((RECORDS, FEATURES + 2), np.float32)
    table[:, -1] = 1
    table[0, :-2], table[1, :-2], table[2, :-2] = 1e30, 1e-40, np.nan
    table[3, :-2] = np.inf
    return table


def test_no_message_tells_two_devices_apart(make_device: MakeDevice) -> None:
    twins = make_device(), make_device(records=strange_points())
    # The folders differ, and nothing else does.
    outside = twins[0].outside

    messages: list[tuple[str, Values, Values, Values]] = []
    arrays = st.one_of(st.just(start(4)), _arrays())
    kinds = st.sampled_from([*KINDS, *["train"] * 20, *["evaluate"] * 6])

    @examples(500)
    @given(kinds, arrays, order_configs(), run_configs(outside.folder))
    def any_run(kind: str, found: Values, config: Values, run: Values) -> None:
        messages.append((kind, found, config, run))

    @examples(700)
    @given(kinds, arrays, order_configs())
    def shipped_run(kind: str, found: Values, config: Values) -> None:
        messages.append((kind, found, config, RUN))

    any_run()
    shipped_run()
    seen_of = []
    for device in twins:  # One after the other, as each has a model of its own.
        seen_of.append(
            [
                seen(device.ask(kind, records(found, config), {**run, "num-rounds": 4}))
                for kind, found, config, run in messages
            ]
        )
        last = device.ask("train", records(start(4), {"plan": "*"}), {**RUN, "num-rounds": 4})
        seen_of[-1].append(seen(last))
    for message, one, other in zip([*messages, None], *seen_of, strict=True):
        assert one == other, message
    assert sum(device.sent for device in twins) >= 2_400
    assert len(twins[0].rows()) == len(twins[1].rows())


def _arrays() -> st.SearchStrategy[dict[str, Any]]:
    from pathlib import Path

    return hostile_arrays(Path("/nonexistent/mark"))


def test_training_tells_nothing_but_noise_whatever_the_records_are(make_device: MakeDevice) -> None:
    tables = [points(1), points(2), strange_points(), np.full_like(points(1), np.nan)]
    tables[3][:, -2:] = [0, 1]
    devices = [make_device(records=table) for table in tables]
    for number, config in enumerate(
        [{"plan": "*"}, {"plan": "B"}, {"plan": "A/B"}, {}, {"share": "A"}]
    ):
        for changes in (
            {},
            {"clip-norm": 1e-6, "lora-alpha": 1e5},
            {"optimizer": "adamw"},
            {"clip-weight-head": 1e-3, "clip-weight-a": 1e3},
        ):
            content = records(start(4), {**config, "server-round": number})
            answers = [device.ask("train", content, {**RUN, **changes}) for device in devices]
            assert len({str(seen(answer)) for answer in answers}) == 1


def test_failures_of_two_devices_are_alike(make_device: MakeDevice) -> None:
    for task in ("failing", "failing_later", "unreadable"):
        name = f"tests.hostile.mixing_tasks:{task}"
        twins = tuple(make_device(task=name, records=points(seed)) for seed in (1, 2))
        for kind in ("train", "evaluate", "query"):
            for config in ({"plan": "*"}, {}, {"x": 1}):
                answer = ask_both(
                    twins,  # type: ignore[arg-type]
                    kind,
                    RecordDict() if kind == "query" else records(start(4), config),
                    {**RUN, "task": name, "local-steps": 6, "num-rounds": 6, "batch-size": RECORDS},
                )
                if kind == "train" and "x" not in config:
                    assert answer.kind == "failed"
        for twin in twins:
            assert len(twin.rows()) == (0 if task == "unreadable" else 2)
