"""A Flower Grid on one machine: real ClientApps, no server and no Ray."""

from __future__ import annotations

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeAlias
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora_flwr.environment import simulating
from fedlora_flwr.flower_internals import Run
from fedlora_flwr.privacy.ledger_batch import Batch
from fedlora_flwr.processes.workers import Execute, one_by_one
from fedlora_flwr.simulations.partitions import Partitions
from fedlora_flwr.strategies.identities import KnownNode
from fedlora_flwr.strategies.inbox import Replies
from fedlora_flwr.wire.identity import acting_for

ClientAppCall: TypeAlias = Callable[[Message, Context], Message]

Served: TypeAlias = tuple[int, RecordDict, dict[str, Message]]
"""A node, its state, and its replies."""

CLIENT_APP_RAISED = 2

TOGETHER = 16
"""Nodes whose rows of the ledger share one sync of the disk, and whose replies are held so long."""


class LocalGrid(Grid):
    """Serves one `ClientApp` for a number of simulated nodes.

    Messages to one node are served in their order; in this process, nodes are served one after the
    other. Node ids are random in every run, as Flower's are, so no code can depend on them. The
    grid vouches for the clients' names, which are those of their partitions, so a strategy asks
    nobody who it is. A node that was never asked takes no memory.

    Parameters
    ----------
    client_app : callable
        The app of every node: a `ClientApp`, or a function of (message, context). Other processes
        need a function that can be imported by its name.
    num_nodes : int
        Number of nodes; node i has ``partition-id`` i.
    run_config : Mapping
        The run config that the app's context carries.
    execute : callable, optional
        Runs the nodes' work (see `executor`); in this process by default.

    Examples
    --------
    >>> def client_app(message, context):
    ...     return Message(message.content, reply_to=message)
    >>> grid = LocalGrid(client_app, num_nodes=3, run_config={})
    >>> with grid.running():
    ...     asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    ...     len(list(grid.send_and_receive(asked)))
    3
    """

    def __init__(
        self,
        client_app: ClientAppCall,
        num_nodes: int,
        run_config: Mapping[str, Any],
        execute: Execute = one_by_one,
    ) -> None:
        self.run_id = secrets.randbits(62)
        self._app = client_app
        self._execute = execute
        self._run_config = dict(run_config)
        self._nodes = Partitions(num_nodes)
        # Only the states of nodes that keep something: most nodes may never be asked.
        self._states: dict[int, RecordDict] = {}
        self._replies: dict[str, Message] = {}
        # Legacy servers send from many threads, but all clients share this process's one model.
        self._turn = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[LocalGrid]:
        """Give this process the identity that Flower's messages need, until the block ends."""
        with acting_for(self.run_id):
            yield self

    def context(self) -> Context:
        """Return a context for a `ServerApp` that runs on this grid."""
        return Context(self.run_id, 1, {}, RecordDict(), dict(self._run_config))

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return Run.create_empty(self.run_id)

    def set_run(self, run: Run) -> None:
        """Use another run's id, also for the nodes."""
        self.run_id = run.run_id

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, in the order of their partitions."""
        return self._nodes

    bindings = None

    def known_nodes(self) -> Mapping[int, KnownNode]:
        """Return the name of each node's partition as its identity."""
        return self._known

    @cached_property
    def _known(self) -> dict[int, KnownNode]:
        names = {node: self._nodes.name(i) for i, node in enumerate(self._nodes)}
        return {node: KnownNode(name, name) for node, name in names.items()}

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the client app on each message and keep the replies."""
        asked = {str(uuid4()): message for message in messages}
        self._replies.update(self._serve(asked))
        return list(asked)

    def _serve(self, asked: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Yield each reply when it is there. Now and then other threads have a turn."""
        by_node: dict[int, list[str]] = {}
        for key, message in asked.items():
            by_node.setdefault(message.metadata.dst_node_id, []).append(key)
        jobs = [
            (self._context_of(node), keys, [asked[key] for key in keys])
            for node, keys in by_node.items()
        ]
        with self._turn:
            served = self._execute(partial(_handle, self._app), jobs)
        while few := self._next(served):
            while few:
                node, state, replies = few.popleft()
                if state or node in self._states:
                    self._states[node] = state
                yield from replies.items()

    def _next(self, served: Iterator[Served]) -> deque[Served]:
        """Serve some nodes. Their rows in this process's ledgers come before their replies."""
        batch = Batch()
        try:
            with self._turn, batch.gathering():
                return deque(islice(served, TOGETHER))
        finally:
            batch.write()

    def _context_of(self, node: int) -> Context:
        return Context(
            run_id=self.run_id,
            node_id=node,
            node_config={
                "partition-id": self._nodes.index(node),
                "num-partitions": len(self._nodes),
            },
            state=self._states.get(node, RecordDict()),
            run_config=self._run_config,
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each only once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies, for which clients work while they are read; none can time out."""
        asked = {str(uuid4()): message for message in messages}
        places = {key: place for place, key in enumerate(asked)}
        return Replies((places[key], reply) for key, reply in self._serve(asked))


def _handle(app: ClientAppCall, job: tuple[Context, Sequence[str], Sequence[Message]]) -> Served:
    """Serve a node's messages; return its id, its state after, and the replies."""
    context, keys, messages = job
    with acting_for(context.run_id), simulating():
        replies = {
            key: _reply(app, message, context) for key, message in zip(keys, messages, strict=True)
        }
    return context.node_id, context.state, replies


def _reply(app: ClientAppCall, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception:  # As in Flower, a client that fails replies with its error.
        return Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)
