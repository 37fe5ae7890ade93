"""Messages one after another: rounds twice, runs between runs, settings that change within one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile.accounting import (
    SLACK,
    composed_epsilon,
    is_a_filter,
    is_bounded_by_first,
)
from tests.hostile.conftest import MakeDevice
from tests.hostile.device import DELTA, EPSILON, RUN, Device, records, start
from tests.hostile.orders import examples

# Settings that change σ, q or the plan; few, as each takes a calibration.
SHAPES: list[dict[str, Any]] = [
    {"num-rounds": 4}, {"num-rounds": 2, "local-steps": 2}, {"batch-size": 8, "num-rounds": 3},
    {"max-rounds": 1, "num-rounds": 4},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {}, {}, {"lr-a": 10.0}, {"clip-norm": 1e-6}, {"optimizer": "adamw"}, {"filter": "ema"},
    {"epsilon": 1e6}, {"delta": 0.5}, {"ledger-scope": "run"}, {"state-dir": "/tmp/x"},
    {"reproducible": True}, {"run-epsilon": 100.0}, {"batch-size": 17}, {"batch-size": 10_000_000},
]  # fmt: skip
ORDERS: list[dict[str, Any]] = [
    {"plan": "*", "server-round": 1}, {"plan": "*", "server-round": 1}, {"plan": "A/B"}, {},
    {"plan": "B", "share": "A", "server-round": 2}, {"plan": "*", "curvature": "secant"},
    {"plan": "AB", "server-round": 1_000_000}, {"plan": "ABA"}, {"weighting": "size"},
]  # fmt: skip
messages = st.tuples(
    st.sampled_from([1, 1, 2, 3]), st.sampled_from(SHAPES), st.sampled_from(OTHERS),
    st.sampled_from(ORDERS), st.sampled_from([4, 4, 4, 4, 3]),
)  # fmt: skip
Sent = tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], int]


@pytest.mark.parametrize("scope", ["lifetime", "run"])
def test_no_sequence_spends_more_than_the_budget(make_device: MakeDevice, scope: str) -> None:
    count = 0

    @examples(25)
    @given(st.lists(messages, min_size=4, max_size=16))
    def sent(sequence: list[Sent]) -> None:
        nonlocal count
        device = make_device(ledger_scope=scope)
        released = sum(_send(device, message).kind == "ok" for message in sequence)
        rows = device.rows()
        assert len(rows) == released
        _check_spent(rows, scope)
        count += device.sent

    sent()
    assert count >= 200, count


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_runs_with_settings_chosen_in_between_stay_within_a_filter(
    make_device: MakeDevice, share: float
) -> None:
    count = 0

    @examples(12)
    @given(st.lists(messages, min_size=6, max_size=16))
    def sent(sequence: list[Sent]) -> None:
        nonlocal count
        device = make_device(run_epsilon=round(EPSILON * share, 4))
        for message in sequence:
            _send(device, message)
        if rows := device.rows():
            _check_spent(rows, "lifetime")
        count += device.sent

    sent()
    assert count >= 80, count


def _send(device: Device, message: Sent) -> Any:
    run, shape, other, order, rank = message
    content = records(start(rank), order)
    return device.ask("train", content, {**RUN, **shape, **other}, run_id=run)


def _check_spent(rows: list[dict[str, Any]], scope: str) -> None:
    if scope == "run":
        for run in {row["run"] for row in rows}:
            own = [row for row in rows if row["run"] == run]
            assert composed_epsilon(own, DELTA) <= EPSILON * SLACK
    elif rows:
        assert is_bounded_by_first(rows, EPSILON, DELTA) or is_a_filter([rows], EPSILON, DELTA)


def test_the_same_round_twice_is_two_releases(device: Device) -> None:
    content = device.order(server_round=1, plan="*")
    first, second = (device.ask("train", content) for _ in range(2))
    assert [row["round"] for row in device.rows()] == [1, 1]
    assert second.numbers["epsilon"] > first.numbers["epsilon"]
    for name, values in first.arrays.items():
        assert (values != second.arrays[name]).any(), "the same noise twice"


def test_other_clients_names_do_not_move_the_account(device: Device) -> None:
    """Whoever a run says it trains, the account is the device's."""
    for run_id, changes in enumerate([{}, {"seed": 1}, {"num-clients": 99}], start=1):
        device.ask("train", device.order(server_round=1), {**RUN, **changes}, run_id=run_id)
    assert {row["client"] for row in device.rows()} == {device.public.client}
