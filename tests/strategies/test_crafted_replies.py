"""One hostile client among four honest ones: whatever it answers, the others' run goes on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import STRATEGIES, FedLoRA
from fedlora_flwr.wire import MOST_ENTRY
from tests.strategies.crafted import HARMLESS, REFUSED, Case, Fault
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
        self.node = sent[HOSTILE].metadata.dst_node_id
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

    @property
    def names(self) -> tuple[str, str]:
        return f"partition-{HOSTILE:06d}: ", f"node {self.node:020d}: "


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
    for name, fault in REFUSED.items():
        found = Round(method, weighting, fault)
        assert found.report.failures, name
        allowed = (*found.names, "node 00000000000000012345: ")
        assert all(line.startswith(allowed) for line in found.report.failures), name
        assert any(line.startswith(found.names) for line in found.report.failures), name
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
        assert all(line.startswith(found.names) for line in found.report.failures), name
        check_usable(found.arrays)
        check_usable(found.after)
        check_told(found)
        if name not in ("no name", "declines"):
            assert f"partition-{HOSTILE:06d}" in clients, name
