"""A wrapper of Flower's grid that does not wait for replies that cannot come."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedlora_flwr.flower_internals import Run
from fedlora_flwr.strategies.identities import KnownNode
from fedlora_flwr.strategies.inbox import Replies

RESTARTED = "the device was restarted during this round and lost its task"
_NODE_UNAVAILABLE = 5
_REPLY_UNAVAILABLE = 4
_SIMULATION = ("InMemoryGrid", "LocalGrid")
_LEEWAY = 1.0  # seconds; a message must still be valid at the last poll
_POLLS = 3.0  # seconds between two polls of a long round, as Flower's own


def is_simulated(grid: Grid) -> bool:
    """Tell whether a grid's clients are simulated by the machine that runs the server.

    Parameters
    ----------
    grid : Grid
        A run's grid, or a wrapper of it.
    """
    own = grid._grid if isinstance(grid, WatchedGrid) else grid
    return type(own).__name__ in _SIMULATION


class WatchedGrid(Grid):
    """A grid that reports what became of each node's message.

    Flower's own grid delivers a message once. If a node is offline when Flower polls, Flower
    reports an error under the SuperLink's name. If a node was restarted between two polls, Flower
    waits for it until the timeout. Messages stay valid for half a day, so a slow node trains for
    rounds that are over, and spends budget on them.

    Flower checks who sends a reply, but it hands out the sender and the type that are written in
    the reply itself, which a node may choose. One reply that cannot be read loses all others that
    were pulled with it.

    Here each reply is pulled on its own and belongs to the node that was asked. Each error comes
    from the node that it is about, a restart is an error at once, and a message is void when its
    round is over.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    bindings : Path, optional
        File that keeps which node's key each identity is bound to, from run to run.
    """

    def __init__(self, grid: Grid, bindings: Path | None = None) -> None:
        self._grid = grid
        self.bindings = bindings

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Take another run's identity."""
        self._grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message to one node."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return Flower's description of the nodes that are connected."""
        return self._grid.get_nodes()

    def known_nodes(self) -> dict[int, KnownNode]:
        """Return each connected node's key, and the name under which it was registered.

        A node that registered itself, without an operator, has no name and a key for one start.
        """
        return {
            node.node_id: KnownNode(
                hashlib.sha256(node.public_key).hexdigest(), node.name, lasting=bool(node.name)
            )
            for node in self._grid.get_nodes()
            if node.public_key
        }

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return what comes back until nothing more can, or time is up."""
        started = time.monotonic()
        deadline = started + (math.inf if timeout is None else timeout)
        sent = [_valid_for(message, timeout) for message in messages]
        activations = self._activations()
        pushed = set(self._grid.push_messages(sent))
        waiting = {m.metadata.message_id: m for m in sent if m.metadata.message_id in pushed}
        return Replies(enumerate(self._replies(waiting, activations, started, deadline)))

    def _replies(
        self,
        waiting: dict[str, Message],
        activations: Mapping[int, str],
        started: float,
        deadline: float,
    ) -> Iterator[Message]:
        """Yield replies as they are pulled, and an error for each message that is lost."""
        looked = started
        while waiting:
            lost: list[str] = []
            if time.monotonic() >= looked + _POLLS:
                # Look for restarts before pulling: a reply counts even if its node is gone.
                lost = _restarted(waiting, activations, self._activations())
                looked = time.monotonic()
            for key in list(waiting):
                if (reply := self._pull(key, waiting[key])) is not None:
                    del waiting[key]
                    yield reply
            yield from [_lost(waiting.pop(key)) for key in lost if key in waiting]
            now = time.monotonic()
            if now >= deadline:
                break
            # Poll often in a short round, and as seldom as Flower does in a long one.
            time.sleep(min(_POLLS, 0.1 + (now - started) / 50, deadline - now) if waiting else 0)

    def _pull(self, key: str, asked: Message) -> Message | None:
        """Return the reply to one message, if it has come, as the reply of the node asked."""
        try:
            found = list(self._grid.pull_messages([key]))
        except Exception as error:  # Flower's parsers raise errors of many types.
            if _from_network(error):  # Flower's server is gone, and no client is to blame.
                raise
            return _unusable(asked, f"its reply cannot be read ({type(error).__name__})")
        # Flower returns everything that nodes push to the server, under ids that they may choose.
        # But no other node knows the id of the message that was sent to it.
        for reply in found:
            if reply.metadata.reply_to_message_id == key:
                return _of_its_node(reply, asked)
        return None

    def _activations(self) -> dict[int, str]:
        """Return when each connected node connected last."""
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}


def _valid_for(message: Message, timeout: float | None) -> Message:
    if timeout is None:
        return message
    about = message.metadata
    return Message(
        message.content,
        about.dst_node_id,
        about.message_type,
        ttl=timeout + _LEEWAY,
        group_id=about.group_id,
    )


def _restarted(
    waiting: Mapping[str, Message], before: Mapping[int, str], now: Mapping[int, str]
) -> list[str]:
    nodes = {key: message.metadata.dst_node_id for key, message in waiting.items()}
    # Flower itself reports a node that is not connected.
    return [key for key, node in nodes.items() if now.get(node) not in (None, before.get(node))]


def _of_its_node(reply: Message, asked: Message) -> Message:
    """Return a reply under the sender and type that Flower's server knows, not the reply's own."""
    if reply.has_error():
        return Message(reply.error, reply_to=asked)
    about, expected = reply.metadata, asked.metadata
    if about.src_node_id != expected.dst_node_id:
        return _unusable(asked, "its reply says that it comes from another node")
    if about.message_type != expected.message_type:
        return _unusable(asked, "its reply does not have the type of the message")
    return Message(reply.content, reply_to=asked)


def _from_network(error: Exception) -> bool:
    """Tell whether the connection to Flower's server failed, and not the parsing of a reply."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(kinds & {"httpx", "grpc"})


def _unusable(asked: Message, reason: str) -> Message:
    return Message(Error(_REPLY_UNAVAILABLE, reason), reply_to=asked)


def _lost(asked: Message) -> Message:
    return Message(Error(_NODE_UNAVAILABLE, RESTARTED), reply_to=asked)
