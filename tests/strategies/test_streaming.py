"""Uploads that are added up as they come: the same results as of kept ones, in less memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.simulations.local_grid import TOGETHER, LocalGrid
from fedlora_flwr.strategies import FedLoRA, strategy_class
from fedlora_flwr.strategies.inbox import Replies
from fedlora_flwr.strategies.robust import Robust
from fedlora_flwr.wire.identity import acting_for
from tests.strategies.tiny import Asked, Tiny, arrays_of, honest, record_of, reply_of, start_arrays

STREAMED = ("dp-lora", "la-lora", "ffa-lora", "rolora", "as-lora", "fedsvd", "ffa-seeds",
            "head-only", "fedsa-lora", "mr-mtl")  # fmt: skip
KEPT = ("flora", "flexlora", "fedex-lora", "fedavg")
MANY = 140  # of rank 2: the stacked factors are wider than what is compared exactly


class Shuffled(LocalGrid):
    """Answers in an order of its own."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        random.Random(7).shuffle(replies)
        return replies


def uploaded(strategy: FedLoRA) -> Any:
    """Answer with what leaves a client of this method, and measure where it asks for it."""

    def answer(asked: Asked) -> RecordDict:
        moved = asked.trained()
        if strategy.shared:
            moved = {n: a for n, a in moved.items() if f"lora_{strategy.shared}" in n}
        return reply_of(moved, asked.partition)

    return answer


def run(name: str, kind: type[LocalGrid] = LocalGrid, rounds: int = 3, **settings: Any) -> FedLoRA:
    strategy = strategy_class(name)(**settings)
    Tiny(MANY, uploaded(strategy), kind=kind).run(strategy, num_rounds=rounds)
    return strategy


@cache
def streamed_run(name: str) -> FedLoRA:
    """Run a method once for all tests that compare with it."""
    return run(name)


def bits(strategy: FedLoRA) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in arrays_of(strategy._result.arrays).items()}


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_round_gives_the_bits_and_figures_of_a_kept_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = streamed_run(name)
    assert streamed.streams
    monkeypatch.setattr(strategy_class(name), "streams", False)
    kept = run(name)
    assert bits(streamed) == bits(kept)
    assert streamed.last_round is not None
    assert kept.last_round is not None
    assert flat(streamed.last_round.compared) == pytest.approx(flat(kept.last_round.compared))
    assert flat(streamed.last_round.details) == pytest.approx(flat(kept.last_round.details))
    assert len(streamed.last_round.uploads) == MANY


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's single numbers by name."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        parts = value.items() if isinstance(value, dict) else enumerate(np.atleast_1d(value))
        found.update({f"{name} {part}": number for part, number in parts})
    return found


@pytest.mark.parametrize("name", STREAMED)
def test_the_order_of_replies_changes_no_bit_of_model_or_rows(name: str) -> None:
    first, second = streamed_run(name), run(name, Shuffled)
    assert bits(first) == bits(second)
    assert first.last_round is not None
    assert second.last_round is not None
    assert first.last_round.compared == second.last_round.compared
    assert first.last_round.details == second.last_round.details


def test_the_order_of_names_changes_no_bit() -> None:
    draw = np.random.default_rng(5)
    start = {f"blocks.{i}.fc.lora_B.weight": draw.normal(size=(40, 3)) for i in range(30)}
    found = []
    for names in (list(start), list(start)[::-1]):
        sums = UpdateSums(start, names)
        for seed in range(3):
            moves = np.random.default_rng(seed)
            sums.add({name: start[name] + moves.normal(size=(40, 3)) for name in start})
        found.append((sums.square("B"), sums.cosine("B"), list(sums.mean())))
    assert found[0] == found[1]


def big_app() -> ClientApp:
    """Clients with a layer of 12,000 x 12,000 at rank 8 that keep nothing of what they send."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        config = message.content.config_records["config"]
        record = message.content.array_records["arrays"]
        plan = ComponentPlan.parse(str(config["plan"]))
        asked = Asked(
            partition, int(str(config["server-round"])), plan, "", arrays_of(record), set()
        )
        moved = asked.trained()
        if share := str(config.get("share", "")):
            moved = {n: a for n, a in moved.items() if f"lora_{share}" in n}
        return Message(reply_of(moved, partition), reply_to=message)

    @app.evaluate()  # type: ignore[untyped-decorator,unused-ignore]
    def evaluate(message: Message, context: Context) -> Message:
        client = f"partition-{int(context.node_config['partition-id']):06d}"
        content = RecordDict(
            {"metrics": MetricRecord(), "config": ConfigRecord({"client": client})}
        )
        return Message(content, reply_to=message)

    return app


def big_start() -> ArrayRecord:
    draw = np.random.default_rng(0)
    return record_of(
        {
            "blocks.0.fc.lora_A.weight": draw.normal(size=(8, 12_000)).astype(np.float32),
            "blocks.0.fc.lora_B.weight": draw.normal(size=(12_000, 8)).astype(np.float32),
            "head.weight": draw.normal(size=(10, 6000)).astype(np.float32),
        }
    )


def peak(name: str, clients: int) -> tuple[int, float]:
    """Return the largest number of bytes that a round has needed, and those of one upload."""
    strategy, start = strategy_class(name)(), big_start()
    with LocalGrid(big_app(), clients, {}).running() as grid:
        tracemalloc.start()
        strategy.start(grid, start, num_rounds=1)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert strategy.last_round is not None
    assert len(strategy.last_round.uploads) == clients
    return most, strategy.last_round.bytes_up / clients


def growth(name: str, few: int, many: int) -> float:
    """Return what each further client of a round takes, in uploads."""
    (least, size), (most, _) = peak(name, few), peak(name, many)
    return (most - least) / (many - few) / size


@pytest.mark.parametrize("name", ["ffa-lora", "rolora", "as-lora", "fedsvd", "head-only", "mr-mtl"])
def test_the_servers_memory_does_not_grow_with_the_cohort(name: str) -> None:
    assert growth(name, TOGETHER, 160) < 0.15


@pytest.mark.parametrize("name", ["dp-lora", "la-lora"])
def test_with_both_factors_it_stops_growing_where_figures_are_estimated(name: str) -> None:
    assert growth(name, 4, 24) > 0.9
    assert growth(name, 40, 160) < 0.15


@pytest.mark.parametrize("name", KEPT)
def test_it_grows_where_a_method_needs_each_upload(name: str) -> None:
    assert growth(name, 4, 24) > 0.9


def test_weights_and_rules_need_each_upload() -> None:
    assert run("ffa-lora", rounds=1).streams
    assert not run("ffa-lora", rounds=1, weighting="size").streams
    strategy = strategy_class("ffa-lora")()
    strategy.robust = Robust("median")
    Tiny(3).run(strategy)
    assert not strategy.streams


def test_uploads_with_different_arrays_are_added_up_apart() -> None:
    class Alternating(FedLoRA):
        def plan(self, server_round: int, layout: Any) -> ComponentPlan:
            return ComponentPlan.parse("B/A")

    def answer(asked: Asked) -> RecordDict:
        moved = asked.trained()
        if asked.partition % 3 == 0:  # These took one step.
            moved = {name: array for name, array in moved.items() if "lora_A" not in name}
        return reply_of(moved, asked.partition)

    def result(answer: Any) -> FedLoRA:
        strategy = Alternating(min_completion=0.1)
        Tiny(MANY, answer).run(strategy)
        assert strategy.streams
        return strategy

    found = result(answer)
    assert found.last_round is not None
    assert len(found.last_round.uploads) == MANY - len(found.last_round.failures)
    assert len(found.last_round.failures) == len(range(0, MANY, 3))

    def only_most(asked: Asked) -> RecordDict:
        if asked.partition % 3 == 0:
            raise RuntimeError("out of battery")
        return honest(asked)

    assert bits(found) == bits(result(only_most))


def test_a_failed_client_leaves_no_trace_in_the_sum() -> None:
    def nan(asked: Asked) -> RecordDict:
        moved = asked.trained()
        if asked.partition == 1:
            moved["head.bias"][0] = np.nan
        return reply_of(moved, asked.partition)

    def gone(asked: Asked) -> RecordDict:
        if asked.partition == 1:
            raise RuntimeError("out of battery")
        return reply_of(asked.trained(), asked.partition)

    found = []
    for answer in (nan, gone):
        strategy = strategy_class("ffa-lora")()
        Tiny(4, answer).run(strategy)
        found.append(bits(strategy))
    assert found[0] == found[1]


def test_replies_are_read_while_clients_work() -> None:
    tiny = Tiny(3 * TOGETHER)
    with tiny.grid() as grid:
        strategy = strategy_class("ffa-lora")()
        asked = list(strategy.configure_train(1, record_of(start_arrays()), ConfigRecord(), grid))
        replies = grid.send_and_receive(asked)
        assert isinstance(replies, Replies)
        for count, _ in enumerate(replies.once(), start=1):
            assert len(tiny.asked) == -(-count // TOGETHER) * TOGETHER
        assert list(replies.once()) == []


def test_replies_are_a_sequence_for_those_who_read_them_twice() -> None:
    with acting_for(1):
        sent = {node: Message(RecordDict(), node, "train") for node in (2, 0, 1)}
    replies = Replies(sent.items())
    assert [reply.metadata.dst_node_id for reply in replies] == [0, 1, 2]
    assert [reply.metadata.dst_node_id for reply in replies] == [0, 1, 2]
    assert len(replies) == 3
    assert replies[-1].metadata.dst_node_id == 2
    assert list(replies.once()) == list(replies[:])
