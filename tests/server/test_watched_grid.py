"""What becomes of messages to nodes that leave or come back; real nodes in test_faults.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.server.watched_grid import RESTARTED, WatchedGrid
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA
from fedlora_flwr.strategies.identities import KnownNode
from fedlora_flwr.strategies.inbox import Replies
from tests.strategies.tiny import Fleet as Unvouched
from tests.strategies.tiny import Tiny, record_of, start_arrays

SUPERLINK = 1
OFFLINE = "Node Unavailable"


class Fleet(Unvouched):
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
        return sorted(self._nodes)[:2] if self.offline or self.deaf else []

    def get_nodes(self) -> Iterable[NodeInfo]:
        restarted = sorted(self._nodes)[:2] if self.restarts and self.pushed else []
        for node in self._nodes:
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


Forge = Callable[[Message, list[Message]], None]


class Forged(Fleet):
    """The first node forges what is written in its replies: Flower hands that out as it is."""

    forge: Forge = staticmethod(lambda reply, others: None)
    broken: Exception | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids, liar = set(message_ids), sorted(self._nodes)[0]
        # Flower looks replies up by what it stored itself, not by what is written in them.
        stored = [
            (key, reply)
            for key, sent in self.pushed.items()
            for reply in self.answers
            if str(key) in ids and reply.metadata.src_node_id == sent.metadata.dst_node_id
        ]
        found = []
        for key, reply in stored:
            self.answers = [kept for kept in self.answers if kept is not reply]
            if self.pushed[key].metadata.dst_node_id == liar:
                if self.broken is not None:
                    raise self.broken
                others = [m for m in self.pushed.values() if m.metadata.dst_node_id != liar]
                self.forge(reply, others)
            found.append(reply)
        return found


def as_another(reply: Message, others: list[Message]) -> None:
    reply.metadata.__dict__["_src_node_id"] = others[0].metadata.dst_node_id


def as_other_type(reply: Message, others: list[Message]) -> None:
    reply.metadata.__dict__["_message_type"] = "train"


def to_another_question(reply: Message, others: list[Message]) -> None:
    reply.metadata.__dict__["_reply_to_message_id"] = "ab" * 32


@contextmanager
def forged(forge: Forge | None = None, broken: Exception | None = None) -> Iterator[Forged]:
    with Forged(Tiny(4).app(), 4, {}).running() as grid:
        assert isinstance(grid, Forged)
        vars(grid).update({"forge": forge} if forge else {"broken": broken})
        yield grid


@pytest.mark.parametrize(
    ("forge", "reason"),
    [(as_another, "it comes from another node"), (as_other_type, "the type of the message")],
)
def test_a_reply_is_of_the_node_that_was_asked_whatever_it_says(forge: Forge, reason: str) -> None:
    with forged(forge) as grid:
        replies = {reply.metadata.src_node_id: reply for reply in ask(grid, 5.0)}
        liar, *honest = sorted(grid._nodes)
        assert set(replies) == {liar, *honest}
        assert reason in str(replies[liar].error.reason)
        assert not any(replies[node].has_error() for node in honest)


def test_a_reply_to_no_question_of_ours_is_no_reply() -> None:
    with forged(to_another_question) as grid:
        replies = ask(grid, 0.5)
        assert {reply.metadata.src_node_id for reply in replies} == {*sorted(grid._nodes)[1:]}


@pytest.mark.parametrize("error", [ValueError("bad head"), KeyError("type"), TypeError("no str")])
def test_a_reply_that_cannot_be_read_is_one_nodes_and_loses_no_other(error: Exception) -> None:
    with forged(broken=error) as grid:
        replies = {reply.metadata.src_node_id: reply for reply in ask(grid, 5.0)}
        liar, *honest = sorted(grid._nodes)
        assert replies[liar].error.reason == f"its reply cannot be read ({type(error).__name__})"
        assert [node for node in honest if not replies[node].has_error()] == honest


@pytest.mark.parametrize("error", [ConnectionError("gone"), httpx.ConnectError("gone")])
def test_when_the_server_is_gone_no_client_is_to_blame(error: Exception) -> None:
    with forged(broken=error) as grid, pytest.raises(type(error), match="gone"):
        ask(grid, 5.0)


def test_nodes_are_known_by_their_keys_and_by_the_names_that_an_operator_gave() -> None:
    class Keys(Fleet):
        def get_nodes(self) -> Iterable[NodeInfo]:
            for i, node in enumerate(sorted(self._nodes)):
                name = f"device-{i:02d}" if i else None
                yield NodeInfo(
                    node_id=node, public_key=bytes([i]) * 40 if i < 3 else b"", name=name
                )

    with Keys(Tiny(4).app(), 4, {}).running() as grid:
        first, second, third, fourth = sorted(grid._nodes)
        known = WatchedGrid(grid).known_nodes()
    assert fourth not in known
    assert (known[first].name, known[first].lasting) == ("", False)
    assert (known[second].name, known[second].lasting) == ("device-01", True)
    assert isinstance(known[third], KnownNode)
    assert len({node.key for node in known.values()}) == 3
    assert all(len(node.key) == 64 for node in known.values())


def test_replies_are_read_as_they_come() -> None:
    """The first two nodes answer only once the replies of the others were read."""
    with fleet(offline=True) as grid:
        late = set(grid.gone())
        queries = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        grid.offline, grid.deaf = False, True
        replies = WatchedGrid(grid).send_and_receive(queries, timeout=60)
        assert isinstance(replies, Replies)
        came = replies.once()
        assert {next(came).metadata.src_node_id for _ in range(2)}.isdisjoint(late)
        answered = [m for m in grid.pushed.values() if m.metadata.dst_node_id in late]
        grid.answers = list(grid.pull_of(answered))
        assert {reply.metadata.src_node_id for reply in came} == late
