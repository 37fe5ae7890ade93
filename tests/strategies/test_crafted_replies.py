"""One hostile client among four honest ones: whatever it answers, the others' run goes on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import STRATEGIES, FedLoRA
from fedlora_flwr.strategies.replies import cap_weights
from fedlora_flwr.wire import MOST_ENTRY
from tests.strategies.crafted import HARMLESS, OWN, REFUSED
from tests.strategies.crafting import Case, Fault
from tests.strategies.tiny import Tiny, arrays_of, record_of, start_arrays

WEIGHTINGS = ("uniform", "size", "inverse-noise")
CLIENTS, HOSTILE = 5, 3
ANSWERS: dict[tuple[type[FedLoRA], int], RecordDict] = {}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Two lines for each of five thousand rounds are of no use to anybody."""
    logger = logging.getLogger("flwr")
    level, logger.level = logger.level, logging.CRITICAL
    yield
    logger.level = level


class Round:
    """What two rounds came to: one with a crafted reply, and one in which all are honest again."""

    def __init__(self, method: str, weighting: str, fault: Fault) -> None:
        steps = {"local_steps": 2}
        self.strategy: FedLoRA = STRATEGIES[method](weighting=weighting, **steps)  # type: ignore[arg-type]
        self.strategy.num_rounds = 2
        with LocalGrid(Tiny(CLIENTS).app(), CLIENTS, {}).running() as grid:
            self.grid = grid
            self.arrays, self.metrics = self.play(1, record_of(start_arrays()), fault)
            report = self.strategy.last_round
            assert report is not None
            self.report = report
            self.after, _ = self.play(2, self.arrays, lambda case: [case.honest()])

    def play(
        self, server_round: int, arrays: ArrayRecord, fault: Fault
    ) -> tuple[ArrayRecord, dict[str, Any]]:
        sent = list(self.strategy.configure_train(server_round, arrays, ConfigRecord(), self.grid))
        names = {node: known.name for node, known in self.grid.known_nodes().items()}
        sent.sort(key=lambda message: names[message.metadata.dst_node_id])
        cases = [Case(message, i, sent) for i, message in enumerate(sent)]
        replies = [self.honest(case, server_round) for case in cases if case.number != HOSTILE]
        # It is the first to answer, so that nobody's name is known yet.
        replies = fault(cases[HOSTILE]) + replies
        found, metrics = self.strategy.aggregate_train(server_round, replies)
        assert found is not None
        return found, dict(metrics or {})

    def honest(self, case: Case, server_round: int) -> Message:
        """Answer as in every run of this method where the first round is played the same way."""
        if server_round > 1:
            return case.honest()
        key = (type(self.strategy), case.number)
        if key not in ANSWERS:
            ANSWERS[key] = case.content()
        return Message(ANSWERS[key], reply_to=case.sent)

    name = f"partition-{HOSTILE:06d}: "


def crash(case: Case) -> list[Message]:
    return [Message(Error(2, "RuntimeError: gone"), reply_to=case.sent)]


@lru_cache
def without(method: str, weighting: str) -> Round:
    """Play the same with a client that crashed."""
    return Round(method, weighting, crash)


def check_usable(arrays: ArrayRecord) -> None:
    for name, array in arrays_of(arrays).items():
        assert np.isfinite(array).all(), name
        assert np.abs(array).max(initial=0) <= MOST_ENTRY, name


def check_told(found: Round) -> None:
    """Nothing that a log, a terminal or a row of JSON cannot hold is passed on."""
    for line in (*found.report.failures, *found.report.declined):
        assert line.isprintable()
        assert len(line) < 3000
    rows = [{**u.texts, **u.metrics, "client": u.client} for u in found.report.uploads]
    text = json.dumps([rows, found.report.details, found.report.failures])
    assert len(text) < 30_000
    assert not any(math.isnan(value) for value in found.metrics.values())


def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) + len(HARMLESS) >= 75
    assert (len(REFUSED) + len(HARMLESS)) * len(STRATEGIES) * len(WEIGHTINGS) >= 2250


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_crafted_reply_is_its_senders_failure_and_leaves_no_trace(
    method: str, weighting: str
) -> None:
    expected = without(method, weighting)
    for name, fault in {**REFUSED, **OWN.get(method, {})}.items():
        if (method, name) == ("head-only", "transposed"):  # What it uploads has one axis.
            continue
        found = Round(method, weighting, fault)
        assert found.report.failures, name
        allowed = (found.name, "node 00000000000000012345: ")
        assert all(line.startswith(allowed) for line in found.report.failures), name
        assert any(line.startswith(found.name) for line in found.report.failures), name
        used = [upload.client for upload in found.report.uploads]
        assert used == [f"partition-{i:06d}" for i in range(CLIENTS) if i != HOSTILE], name
        for one, other in ((found.arrays, expected.arrays), (found.after, expected.after)):
            values = arrays_of(one)
            for key, array in arrays_of(other).items():
                assert values[key].tobytes() == array.tobytes(), (name, key)
        assert found.metrics == expected.metrics, name
        check_told(found)


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_is_not_refused_does_no_harm_to_the_run(method: str, weighting: str) -> None:
    for name, fault in HARMLESS.items():
        found = Round(method, weighting, fault)
        clients = {upload.client for upload in found.report.uploads}
        assert clients >= {f"partition-{i:06d}" for i in range(CLIENTS) if i != HOSTILE}, name
        assert all(line.startswith(found.name) for line in found.report.failures), name
        check_usable(found.arrays)
        check_usable(found.after)
        check_told(found)
        if name not in ("no name", "declines"):
            assert f"partition-{HOSTILE:06d}" in clients, name


FIGURES = {"loss": 0.5, "accuracy": 0.25, "num-examples": 4}
BAD_FIGURES: dict[str, dict[str, object]] = {
    "nan": {**FIGURES, "loss": math.nan},
    "inf": {**FIGURES, "accuracy": math.inf},
    "beyond float": {**FIGURES, "loss": 10**400},
    "huge": {**FIGURES, "loss": 1e300},
    "a list": {**FIGURES, "loss": [0.5]},
    "a text": {**FIGURES, "loss": "0.5"},
    "none": {**FIGURES, "loss": None},
    "no loss": {"accuracy": 0.25, "num-examples": 4},
    "other figures": {**FIGURES, "round": 7.0, "plan": 3.0},
    "escapes": {**FIGURES, "\x1b[2J\n": 1.0},
    "many": {**FIGURES, **{f"m{i}": 1.0 for i in range(200)}},
    "examples negative": {**FIGURES, "num-examples": -4},
    "examples beyond the limit": {**FIGURES, "num-examples": 10**12},
    "nothing": {},
}


def measured(metrics: Mapping[str, object], message: Message, partition: int) -> Message:
    content = RecordDict(
        {
            "metrics": MetricRecord(),
            "config": ConfigRecord({"client": f"partition-{partition:06d}"}),
        }
    )
    content.metric_records["metrics"].__dict__["_data"].update(metrics)
    return Message(content, reply_to=message)


def measure(
    method: str, bad: Mapping[str, object] | None, weighted_by: int = 4
) -> tuple[FedLoRA, dict[str, Any] | None]:
    """Play a round and its evaluation, in which one client sends bad figures, or an error."""
    strategy: FedLoRA = STRATEGIES[method](fraction_evaluate=1.0)
    with LocalGrid(Tiny(CLIENTS).app(), CLIENTS, {}).running() as grid:
        arrays, config = record_of(start_arrays()), ConfigRecord()
        sent = list(strategy.configure_train(1, arrays, config, grid))
        numbers = {node: int(known.name[-6:]) for node, known in grid.known_nodes().items()}
        strategy.aggregate_train(
            1, [Case(m, numbers[m.metadata.dst_node_id], sent).honest() for m in sent]
        )
        asked = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid))
        assert len(asked) == CLIENTS
        replies = []
        for message in asked:
            number = numbers[message.metadata.dst_node_id]
            own = {**FIGURES, "loss": float(number), "num-examples": weighted_by}
            if number != HOSTILE:
                replies.append(measured(own, message, number))
            elif bad is None:
                replies.append(Message(Error(2, "gone"), reply_to=message))
            else:
                replies.append(measured(bad, message, number))
        found = strategy.aggregate_evaluate(1, replies)
    return strategy, None if found is None else dict(found)


@pytest.mark.parametrize("method", ["fedsa-lora", "dp-lora"])
@pytest.mark.parametrize("name", BAD_FIGURES)
def test_figures_that_cannot_be_used_are_one_clients_failure(method: str, name: str) -> None:
    _, expected = measure(method, None)
    strategy, found = measure(method, BAD_FIGURES[name])
    assert found == expected
    assert found is not None
    assert found["loss"] == pytest.approx((0 + 1 + 2 + 4) / 4)
    report = strategy.last_round
    assert report is not None
    (line,) = report.failures
    assert line.startswith(f"partition-{HOSTILE:06d}: ")
    assert line.isprintable()


@pytest.mark.parametrize("method", ["fedsa-lora", "dp-lora"])
def test_a_client_that_claims_all_examples_does_not_get_all_of_the_figures(method: str) -> None:
    _, found = measure(method, {**FIGURES, "loss": 1000.0, "num-examples": 10**9})
    assert found is not None
    share = 1 / 5 if method == "fedsa-lora" else 10 / 14
    rest = (0 + 1 + 2 + 4) / 4
    assert found["loss"] == pytest.approx(share * 1000 + (1 - share) * rest)


def test_no_examples_at_all_are_no_figures() -> None:
    assert measure("dp-lora", FIGURES | {"num-examples": 0}, weighted_by=0)[1] is None


@pytest.mark.parametrize("weighting", ["size", "inverse-noise"])
def test_a_weight_cannot_buy_more_than_ten_times_the_median(weighting: str) -> None:
    def claim(case: Case) -> list[Message]:
        content = case.content()
        content.metric_records["metrics"]["weight"] = 1e9
        return [Message(content, reply_to=case.sent)]

    found = Round("dp-lora", weighting, claim)
    weights = {u.client: u.weight for u in found.report.uploads}
    assert sorted(weights.values()) == [10.0, 11.0, 12.0, 14.0, 120.0]
    assert weights[f"partition-{HOSTILE:06d}"] == 120.0


def test_weights_of_honest_clients_are_used_as_they_are() -> None:
    assert cap_weights([1.0, 4.0, 7.0]) == [1.0, 4.0, 7.0]
    assert cap_weights([1.0, 10.0, 100.0]) == [1.0, 10.0, 100.0]
    assert cap_weights([3.0]) == [3.0]
    assert cap_weights([3.0, 1e9]) == [3.0, 30.0]


def test_a_weight_above_what_is_public_is_refused() -> None:
    strategy = FedLoRA(weighting="size", max_weight=11.0)
    strategy.num_rounds = 1
    with LocalGrid(Tiny(3).app(), 3, {}).running() as grid:
        config = ConfigRecord()
        sent = list(strategy.configure_train(1, record_of(start_arrays()), config, grid))
        numbers = {node: int(known.name[-6:]) for node, known in grid.known_nodes().items()}
        strategy.aggregate_train(
            1, [Case(m, numbers[m.metadata.dst_node_id], sent).honest() for m in sent]
        )
    assert strategy.last_round is not None
    assert [u.weight for u in strategy.last_round.uploads] == [10.0, 11.0]
    (line,) = strategy.last_round.failures
    assert line.startswith("partition-000002: weight = 12.0 cannot be used: expected a number")
