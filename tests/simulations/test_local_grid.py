from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedlora_flwr.simulations.local_grid import LocalGrid


def echo_app() -> ClientApp:
    """Answer with who is asked, how often it was asked before, and what was asked."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train(message: Message, context: Context) -> Message:
        if message.content.config_records["config"].get("crash"):
            raise ValueError("out of paper")
        seen = context.state.config_records.setdefault("seen", ConfigRecord({"count": 0}))
        seen["count"] = int(str(seen["count"])) + 1
        answer = ConfigRecord(
            {
                "partition": context.node_config["partition-id"],
                "of": context.node_config["num-partitions"],
                "rank": context.run_config["rank"],
                "count": seen["count"],
                "number": message.content.config_records["config"]["number"],
            }
        )
        return Message(RecordDict({"config": answer}), reply_to=message)

    return app


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    with LocalGrid(echo_app(), 4, {"rank": 8}).running() as grid:
        yield grid


def question(grid: LocalGrid, node: int, number: int = 0, crash: bool = False) -> Message:
    config = ConfigRecord({"number": number, "crash": crash})
    return grid.create_message(RecordDict({"config": config}), "train", node, "group")


def answer(reply: Message) -> dict[str, object]:
    return dict(reply.content.config_records["config"])


def test_every_node_serves_its_own_partition(grid: LocalGrid) -> None:
    messages = [question(grid, node) for node in grid.get_node_ids()]
    answers = [answer(reply) for reply in grid.send_and_receive(messages)]
    assert sorted(str(a["partition"]) for a in answers) == ["0", "1", "2", "3"]
    assert all(a["of"] == 4 and a["rank"] == 8 for a in answers)


def test_replies_belong_to_their_messages(grid: LocalGrid) -> None:
    nodes = [*grid.get_node_ids()] * 2
    messages = [question(grid, node, number) for number, node in enumerate(nodes)]
    replies = list(grid.send_and_receive(messages))
    assert [answer(reply)["number"] for reply in replies] == list(range(8))
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    assert [answer(reply)["count"] for reply in replies] == [1] * 4 + [2] * 4


def test_every_reply_is_handed_out_once(grid: LocalGrid) -> None:
    node = next(iter(grid.get_node_ids()))
    first, second = grid.push_messages([question(grid, node, number) for number in (1, 2)])
    assert first != second
    assert [answer(reply)["number"] for reply in grid.pull_messages([second])] == [2]
    assert list(grid.pull_messages([second, "unknown"])) == []
    assert [answer(reply)["number"] for reply in grid.pull_messages([first, second])] == [1]


def test_messages_from_many_threads_are_served_one_after_the_other() -> None:
    inside, overlaps = [0], []
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train(message: Message, context: Context) -> Message:
        inside[0] += 1
        time.sleep(0.01)
        overlaps.append(inside[0])
        inside[0] -= 1
        return Message(RecordDict(), reply_to=message)

    with LocalGrid(app, 6, {}).running() as grid, ThreadPoolExecutor(6) as pool:
        messages = [question(grid, node) for node in grid.get_node_ids()]
        list(pool.map(lambda message: list(grid.send_and_receive([message])), messages))
    assert overlaps == [1] * 6


def test_a_clients_exception_is_its_reply(grid: LocalGrid) -> None:
    good, bad = list(grid.get_node_ids())[:2]
    replies = list(grid.send_and_receive([question(grid, bad, crash=True), question(grid, good)]))
    assert [reply.has_error() for reply in replies] == [True, False]
    assert "ValueError: out of paper" in str(replies[0].error.reason)
    assert replies[0].metadata.src_node_id == bad


def test_node_ids_are_random() -> None:
    ids = [tuple(LocalGrid(echo_app(), 3, {}).get_node_ids()) for _ in range(5)]
    assert len(set(ids)) == 5
    assert all(len(set(group)) == 3 for group in ids)


def test_partitions_do_not_follow_the_order_of_node_ids() -> None:
    orders = set()
    for _ in range(20):
        with LocalGrid(echo_app(), 4, {"rank": 1}).running() as grid:
            nodes = sorted(grid.get_node_ids())
            replies = grid.send_and_receive([question(grid, node) for node in nodes])
            orders.add(tuple(str(answer(reply)["partition"]) for reply in replies))
    assert len(orders) > 1


def test_runs_have_ids_of_their_own() -> None:
    assert len({LocalGrid(echo_app(), 1, {}).run_id for _ in range(5)}) == 5
    grid = LocalGrid(echo_app(), 1, {"rank": 2})
    assert grid.run.run_id == grid.context().run_id == grid.run_id
    assert grid.context().run_config == {"rank": 2}


def identity() -> tuple[object, ...]:
    return tuple(getattr(TaskIdentity, f"_{name}") for name in ("run_id", "node_id", "task_id"))


def test_the_processs_identity_is_given_back() -> None:
    before = identity()
    outer, inner = LocalGrid(echo_app(), 1, {}), LocalGrid(echo_app(), 1, {})
    with outer.running():
        assert TaskIdentity.run_id == outer.run_id
        with inner.running():
            assert TaskIdentity.run_id == inner.run_id
        assert TaskIdentity.run_id == outer.run_id
    assert identity() == before


def test_the_processs_identity_is_given_back_after_an_error() -> None:
    before = identity()
    with pytest.raises(ZeroDivisionError), LocalGrid(echo_app(), 1, {}).running():
        _ = 1 // 0
    assert identity() == before
