"""Uploads of a secure sum: what is accepted, and what is opened of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import FFALoRA
from fedlora_flwr.strategies.expected import Expected
from fedlora_flwr.strategies.replies import RoundReport, Upload
from fedlora_flwr.strategies.round import Round
from fedlora_flwr.strategies.secure_sum import Ask, asks_for_shares, check_share, opened_upload
from fedlora_flwr.wire.order import Order
from fedlora_flwr.wire.records import read_training, train_records
from fedlora_flwr.wire.report import Report
from tests.strategies.tiny import B_NAMES, NAMES, start_arrays

SENT = (*B_NAMES, "head.bias")


class Adding:
    """Adds, and takes the sum for the arrays."""

    dropouts, noise_multiplier, grid_norm, remark = 1, 2.5, 4096, ""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        pass

    def agree(self, ask: Ask, order: Order, nodes: Sequence[int]) -> dict[int, Order]:
        return dict.fromkeys(nodes, order)

    def total(
        self, ask: Ask, nodes: Sequence[int], shares: Mapping[str, NDArray[np.uint32]]
    ) -> dict[str, NDArray[np.int64]]:
        return {name: total.astype(np.int64) for name, total in shares.items()}

    def step(
        self, server_round: int, current: Any, total: Mapping[str, Any], count: int
    ) -> dict[str, NDArray[np.floating]]:
        return {name: part / count for name, part in total.items()}


NODES = {str(i): i for i in range(10)}


def nobody(orders: Mapping[int, Order], length: int) -> dict[int, bytes]:
    return {}


def shares(value: int = 1, records: int = 10) -> dict[str, NDArray[np.uint32]]:
    found = {n: np.full(start_arrays()[n].shape, value, np.uint32) for n in SENT}
    return {**found, "num-examples": np.array([records], np.uint32)}


def expected() -> Expected:
    return Expected.of(Layout(NAMES), ComponentPlan.parse("B"), "", 1)


def opened(clients: int, sent: int) -> tuple[list[Upload], dict[str, Any]]:
    """Take uploads and open their sum; return the round's one upload, and its details."""
    this, report = Round(), RoundReport(1, "B", sent)
    report.uploads = [this.take(Upload(str(i), {}, 1.0, {}, {}, shares(i))) for i in range(clients)]
    assert not any(upload.shares for upload in report.uploads)  # No share is kept.
    total = this.shares(report.uploads)
    found = opened_upload(Adding(), nobody, start_arrays(), report, total, NODES)
    return found, report.details


def test_a_sum_is_the_one_upload_of_its_round() -> None:
    (upload,), details = opened(3, 4)

    assert set(upload.arrays) == set(SENT)
    assert all((array == 3 / 30).all() for array in upload.arrays.values())
    assert details == {"shares": 3, "opened": True}


def test_nothing_is_opened_where_more_are_missing_than_the_noise_allows_for() -> None:
    assert opened(2, 4) == ([], {"shares": 2, "opened": False})


def test_an_order_names_the_cohort_and_the_grid() -> None:
    order = asks_for_shares(Order(3, "B"), Adding(), 7)

    assert Order.from_config(order.to_config()) == Order(
        3, "B", cohort=7, sum_noise=2.5, grid_norm=4096
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"num-examples": None},
        {"num-examples": np.array([1, 2], np.uint32)},
        {"head.bias": None},
        {"head.bias": np.zeros(6, np.uint32)},
        {"blocks.0.fc.lora_A.weight": np.zeros((2, 3), np.uint32)},
    ],
)
def test_a_share_of_something_else_is_its_senders_failure(wrong: dict[str, Any]) -> None:
    check_share(expected(), start_arrays(), shares())
    given = {n: a for n, a in {**shares(), **wrong}.items() if a is not None}

    with pytest.raises(InvalidValue):
        check_share(expected(), start_arrays(), given)


def reply(**content: Any) -> RecordDict:
    return train_records(Report(client="one", status="ok", **content))


def test_shares_travel_whole() -> None:
    given = shares(2**32 - 1)

    found = read_training(reply(shares=given))

    assert not found.arrays
    assert all(np.array_equal(found.shares[name], given[name]) for name in given)


@pytest.mark.parametrize("by_sum", [True, False])
def test_each_trust_model_refuses_the_uploads_of_the_other(by_sum: bool) -> None:
    strategy, found = FFALoRA(), RoundReport(1, "B", 1)
    strategy._round = Round(start_arrays(), ComponentPlan.parse("B"), expected())
    strategy.opener = Adding() if by_sum else None
    arrays = {name: start_arrays()[name] for name in SENT}

    strategy._read("one", reply(shares=shares()), found)
    strategy._read("two", reply(arrays=arrays), found)

    assert [upload.client for upload in found.uploads] == (["one"] if by_sum else ["two"])
    assert len(found.failures) == 1
    assert found.failures[0].startswith("two" if by_sum else "one")


@pytest.mark.parametrize("by_sum", [True, False])
def test_an_upload_of_both_kinds_is_refused(by_sum: bool) -> None:
    strategy, found = FFALoRA(), RoundReport(1, "B", 1)
    strategy._round = Round(start_arrays(), ComponentPlan.parse("B"), expected())
    strategy.opener = Adding() if by_sum else None
    # Under other names: those of one kind would replace those of the other.
    more = {"more": np.ones(3, np.float32)}
    arrays = {name: start_arrays()[name] for name in SENT}
    both = {"shares": shares(), "arrays": more}
    if not by_sum:
        both = {"arrays": arrays, "shares": {"more": np.ones(3, np.uint32)}}

    strategy._read("one", reply(**both), found)

    assert not found.uploads
    assert "as the run has trust-model" in found.failures[0]
