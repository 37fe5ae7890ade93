"""What becomes of messages to nodes that leave or come back; real nodes in test_faults.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fedlora_flwr.deploy.watched_grid import RESTARTED, WatchedGrid
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA
from tests.strategies.tiny import Tiny, record_of, start_arrays

SUPERLINK = 1
OFFLINE = "Node Unavailable"


class Fleet(LocalGrid):
    """Nodes of which the first two may be offline, or come back; ids and errors as Flower's."""

    offline = False
    restarts = False
    deaf = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.pushed = {str(uuid4()): message for message in messages}
        for key, message in self.pushed.items():
            message.metadata.__dict__["_message_id"] = key
        answered = [m for m in messages if m.metadata.dst_node_id not in self.gone()]
        self.answers = list(self.pull_of(answered))
        return list(self.pushed)

    def pull_of(self, messages: list[Message]) -> Iterable[Message]:
        return LocalGrid.pull_messages(self, LocalGrid.push_messages(self, messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        here = [*self.answers, *(self.errors() if self.offline else [])]
        found = [r for r in here if r.metadata.reply_to_message_id in set(message_ids)]
        self.answers = [reply for reply in self.answers if reply not in found]
        return found

    def errors(self) -> Iterator[Message]:
        for message in self.pushed.values():
            if message.metadata.dst_node_id in self.gone():
                error = Message(Error(5, OFFLINE), reply_to=message)
                error.metadata.__dict__["_src_node_id"] = SUPERLINK
                yield error

    def gone(self) -> list[int]:
        return sorted(self._partitions)[:2] if self.offline or self.deaf else []

    def get_nodes(self) -> Iterable[NodeInfo]:
        restarted = sorted(self._partitions)[:2] if self.restarts and self.pushed else []
        for node in self._partitions:
            yield NodeInfo(node_id=node, last_activated_at="2" if node in restarted else "1")

    pushed: dict[str, Message] = {}  # noqa: RUF012
    answers: list[Message] = []  # noqa: RUF012


@contextmanager
def fleet(**state: bool) -> Iterator[Fleet]:
    with Fleet(Tiny(4).app(), 4, {}).running() as grid:
        assert isinstance(grid, Fleet)
        vars(grid).update(state)
        yield grid


def ask(grid: Fleet, timeout: float | None) -> list[Message]:
    queries = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    return list(WatchedGrid(grid).send_and_receive(queries, timeout=timeout))


def test_an_error_is_of_the_node_that_it_is_about() -> None:
    with fleet(offline=True) as grid:
        strategy = FedLoRA(min_completion=0.5)
        strategy.start(WatchedGrid(grid), record_of(start_arrays()), num_rounds=1, timeout=600)
        names = [f"node {node:020d}: {OFFLINE}" for node in grid.gone()]
    assert strategy.last_round is not None
    assert strategy.last_round.failures == names
    assert len(strategy.last_round.uploads) == 2


def test_offline_nodes_count_once_against_the_minimum() -> None:
    with fleet(offline=True) as grid, pytest.raises(FederationAborted, match="2 of 4") as caught:
        FedLoRA(min_completion=0.6).start(WatchedGrid(grid), record_of(start_arrays()), 1)
    assert str(caught.value).count("node ") == 2


def test_nobody_waits_for_a_node_that_was_restarted() -> None:
    with fleet(deaf=True, restarts=True) as grid:
        replies = ask(grid, timeout=None)
        lost = {r.metadata.src_node_id: r.error.reason for r in replies if r.has_error()}
        assert lost == dict.fromkeys(grid.gone(), RESTARTED)
    assert len(replies) == 4


def test_a_reply_counts_although_its_node_was_restarted_since() -> None:
    with fleet(restarts=True) as grid:
        assert not any(reply.has_error() for reply in ask(grid, timeout=None))


def test_a_silent_node_is_waited_for_until_the_timeout_and_no_longer() -> None:
    with fleet(deaf=True) as grid:
        replies = ask(grid, timeout=0.5)
    assert len(replies) == 2


@pytest.mark.parametrize(("timeout", "valid"), [(90.0, 91.0), (86_400.0, 86_401.0)])
def test_a_message_is_void_soon_after_its_round(timeout: float, valid: float) -> None:
    with fleet() as grid:
        ask(grid, timeout)
        assert {message.metadata.ttl for message in grid.pushed.values()} == {valid}
