from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA, FFALoRA, RoundReport
from tests.strategies.tiny import (
    A_NAMES,
    B_NAMES,
    NAMES,
    Answer,
    Asked,
    Tiny,
    arrays_of,
    declined,
    honest,
    record_of,
    reply_of,
    start_arrays,
)

Numbers = dict[str, NDArray[Any]]


def crash(asked: Asked) -> RecordDict:
    raise RuntimeError(f"disk of client {asked.partition} is full")


def only(partitions: Iterable[int], bad: Answer, good: Answer = honest) -> Answer:
    """Let some clients answer badly."""
    return lambda asked: (bad if asked.partition in partitions else good)(asked)


def report_of(strategy: FedLoRA) -> RoundReport:
    assert strategy.last_round is not None
    return strategy.last_round


def test_a_round_goes_on_above_the_minimum_and_tells_who_failed() -> None:
    strategy = FedLoRA(min_completion=0.5)
    tiny = Tiny(4, only([0, 2], crash))
    final = arrays_of(tiny.run(strategy).arrays)
    report = report_of(strategy)
    assert [upload.client for upload in report.uploads] == ["partition-000001", "partition-000003"]
    assert len(report.failures) == 2
    assert any("disk of client 0 is full" in line for line in report.failures)
    uploads = [arrays_of(content.array_records["arrays"]) for content in tiny.uploads]
    for name in NAMES:
        mean = np.mean([upload[name] for upload in uploads], axis=0, dtype=np.float64)
        np.testing.assert_allclose(final[name], mean, rtol=1e-6)


def test_a_round_below_the_minimum_aborts_with_the_reasons() -> None:
    with pytest.raises(FederationAborted) as caught:
        Tiny(4, only([0, 1, 2], crash)).run(FedLoRA(min_completion=0.5))
    message = str(caught.value)
    assert "Round 1: 1 of 4 clients answered" in message
    assert "min-completion = 0.5" in message
    assert all(f"disk of client {partition} is full" in message for partition in range(3))


@pytest.mark.parametrize("min_completion", [0.0, 0.5])
def test_without_any_answer_there_is_no_result(min_completion: float) -> None:
    with pytest.raises(FederationAborted, match="disk of client 1 is full"):
        Tiny(3, crash).run(FedLoRA(min_completion=min_completion))


def broken(change: Callable[[Numbers], None]) -> Answer:
    def answer(asked: Asked) -> RecordDict:
        arrays: Numbers = dict(asked.trained())
        change(arrays)
        return reply_of(arrays, asked.partition)

    return answer


def put(name: str, value: NDArray[Any]) -> Callable[[Numbers], None]:
    return lambda arrays: arrays.update({name: value})


def drop(name: str) -> Callable[[Numbers], None]:
    def change(arrays: Numbers) -> None:
        del arrays[name]

    return change


BROKEN = {
    "NaN": (put(B_NAMES[0], np.full((4, 2), np.nan, np.float32)), "NaN or infinity"),
    "infinity": (put("head.bias", np.full(5, np.inf, np.float32)), "NaN or infinity"),
    "infinite in fp32": (put("head.bias", np.full(5, 1e300)), "NaN or infinity"),
    "shape": (put(B_NAMES[0], np.zeros((2, 4), np.float32)), f"shape of {B_NAMES[0]}"),
    "frozen factor": (put(A_NAMES[0], np.zeros((2, 3), np.float32)), A_NAMES[0]),
    "unknown name": (put("blocks.9.fc.lora_B.weight", np.zeros((4, 2), np.float32)), "blocks.9"),
    "missing array": (drop(B_NAMES[1]), B_NAMES[1]),
    "no array": (lambda arrays: arrays.clear(), "uploaded arrays"),
    "whole numbers": (put(B_NAMES[0], np.ones((4, 2), np.int64)), "int64"),
    "text": (put(B_NAMES[0], np.full((4, 2), "x")), f"type of {B_NAMES[0]}"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_upload_that_cannot_be_used_is_one_clients_failure(case: str) -> None:
    change, reason = BROKEN[case]
    strategy, clean = FFALoRA(), FFALoRA()
    result = Tiny(3, only([2], broken(change))).run(strategy)
    (failure,) = report_of(strategy).failures
    assert failure.startswith("partition-000002: ")
    assert reason in failure
    # Exactly what comes out where that client crashes: nothing of it went in.
    expected = Tiny(3, only([2], crash)).run(clean)
    for name, array in arrays_of(expected.arrays).items():
        np.testing.assert_array_equal(arrays_of(result.arrays)[name], array)


def without_arrays(asked: Asked) -> RecordDict:
    content = honest(asked)
    del content["arrays"]
    return content


def with_two_array_records(asked: Asked) -> RecordDict:
    content = honest(asked)
    content["more"] = record_of(asked.trained())
    return content


def with_junk(asked: Asked) -> RecordDict:
    content = honest(asked)
    arrays = dict(content.array_records["arrays"])
    arrays["head.bias"] = Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=b"")
    content["arrays"] = ArrayRecord(arrays)
    return content


@pytest.mark.parametrize("bad", [without_arrays, with_two_array_records, with_junk])
def test_a_malformed_reply_is_one_clients_failure(bad: Answer) -> None:
    strategy = FFALoRA()
    Tiny(3, only([1], bad)).run(strategy)
    assert [line.split(":")[0] for line in report_of(strategy).failures] == ["partition-000001"]
    assert len(report_of(strategy).uploads) == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), None])
@pytest.mark.parametrize("weighting", ["size", "inverse-noise"])
def test_a_weight_that_means_nothing_is_one_clients_failure(
    weighting: str, weight: float | None
) -> None:
    def answer(asked: Asked) -> RecordDict:
        content = reply_of(asked.trained(), asked.partition, weight=1.0)
        if asked.partition == 0:
            del content.metric_records["metrics"]["weight"]
            del content.metric_records["metrics"]["num-examples"]
            if weight is not None:
                content.metric_records["metrics"]["weight"] = weight
        return content

    strategy = FedLoRA(weighting=weighting)
    Tiny(3, answer).run(strategy)
    (failure,) = report_of(strategy).failures
    assert failure.startswith("partition-000000: ")
    assert "weight" in failure


def test_when_all_decline_the_run_aborts_with_the_reason() -> None:
    with pytest.raises(FederationAborted, match="partition-000001: its privacy budget is spent"):
        Tiny(3, lambda asked: declined(asked.partition)).run(FedLoRA())


def test_when_some_decline_the_round_goes_on() -> None:
    strategy = FedLoRA(min_completion=1.0)
    Tiny(4, only([1, 2], lambda asked: declined(asked.partition))).run(strategy)
    report = report_of(strategy)
    assert len(report.uploads) == 2
    assert report.failures == []
    assert [line.split(":")[0] for line in report.declined] == [
        "partition-000001",
        "partition-000002",
    ]


def test_a_declining_clients_arrays_are_not_used() -> None:
    def answer(asked: Asked) -> RecordDict:
        content = honest(asked)
        content.config_records["config"]["status"] = "budget-exhausted"
        return content

    with pytest.raises(FederationAborted, match="no client sent arrays"):
        Tiny(2, answer).run(FedLoRA())


class LossyGrid(LocalGrid):
    """Loses the replies of one node, as a real grid does when a round times out."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        lost = max(self.get_node_ids())
        replies = super().send_and_receive(messages, timeout=timeout)
        return [reply for reply in replies if reply.metadata.src_node_id != lost]


def test_a_client_that_stays_silent_is_a_failure() -> None:
    strategy = FedLoRA(min_completion=0.5)
    with LossyGrid(Tiny(3).app(), 3, {}).running() as grid:
        strategy.start(grid, record_of(start_arrays()), num_rounds=1)
        lost = max(range(3), key=grid._nodes.node)
    assert report_of(strategy).failures == [f"partition-{lost:06d}: no reply in time"]


def test_a_client_that_stays_silent_counts_against_the_minimum() -> None:
    strategy = FedLoRA(min_completion=1.0)
    with (
        LossyGrid(Tiny(3).app(), 3, {}).running() as grid,
        pytest.raises(FederationAborted, match=r"2 of 3 clients answered.*no reply in time"),
    ):
        strategy.start(grid, record_of(start_arrays()), num_rounds=1)


def test_clients_that_trained_different_arrays_are_not_averaged() -> None:
    class Alternating(FedLoRA):
        def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
            return ComponentPlan.parse("B/A")

    def one_step(asked: Asked) -> RecordDict:
        arrays = {name: v for name, v in asked.trained().items() if name not in A_NAMES}
        return reply_of(arrays, asked.partition)

    strategy = Alternating()
    Tiny(2, one_step).run(strategy)
    assert len(report_of(strategy).uploads) == 2

    # The others' upload is not lost to one client's, nor is the run; of two the larger counts.
    for answer, failed in ((only([0], one_step), 0), (only([0], honest, one_step), 0)):
        strategy = Alternating()
        Tiny(4, answer).run(strategy)
        assert [u.client[-1] for u in report_of(strategy).uploads] == ["1", "2", "3"]
        (line,) = report_of(strategy).failures
        assert line.startswith(f"partition-00000{failed}: it uploaded other arrays than most")
    strategy = Alternating()
    Tiny(2, only([0], one_step)).run(strategy)
    assert [u.client for u in report_of(strategy).uploads] == ["partition-000001"]


def test_where_the_number_of_steps_is_known_an_upload_holds_what_they_train() -> None:
    class Alternating(FedLoRA):
        def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
            return ComponentPlan.parse("B/A")

    def one_step(asked: Asked) -> RecordDict:
        arrays = {name: v for name, v in asked.trained().items() if name not in A_NAMES}
        return reply_of(arrays, asked.partition)

    for steps, used in ((1, "0"), (2, "123"), (5, "123")):
        strategy = Alternating(local_steps=steps, min_completion=0.1)
        Tiny(4, only([0], one_step)).run(strategy)
        assert "".join(u.client[-1] for u in report_of(strategy).uploads) == used


def test_a_client_whose_ledger_forgets_is_refused_from_then_on() -> None:
    counted = {0: iter([5.0, 5.0, 10.0]), 1: iter([5.0, 10.0, 15.0]), 2: iter([5.0, 10.0, 0.0])}

    def answer(asked: Asked) -> RecordDict:
        content = honest(asked)
        content.metric_records["metrics"]["steps"] = next(counted[asked.partition])
        return content

    strategy, failures, used = FedLoRA(min_completion=0.3), [], []
    aggregate = strategy.aggregate_train

    def watch(server_round: int, replies: Iterable[Message]) -> Any:
        found = aggregate(server_round, replies)
        failures.append(report_of(strategy).failures)
        used.append(len(report_of(strategy).uploads))
        return found

    strategy.aggregate_train = watch  # type: ignore[method-assign]
    Tiny(3, answer).run(strategy, num_rounds=3)

    assert used == [3, 2, 2]
    assert [len(lines) for lines in failures] == [0, 1, 1]
    assert "partition-000000: its ledger counts 5 private steps after 5" in failures[1][0]
    assert "partition-000002: its ledger counts 0 private steps after 10" in failures[2][0]
