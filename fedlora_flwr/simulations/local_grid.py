"""A Flower Grid in this process: real ClientApps, no server and no Ray."""

from __future__ import annotations

import secrets
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_APP_RAISED = 2


class LocalGrid(Grid):
    """Serves one `ClientApp` for a number of simulated nodes, one message after the other.

    Node ids are random in every run, as Flower's are, so that nothing can come to depend on them.

    Parameters
    ----------
    client_app : ClientApp
        The app that every node runs.
    num_nodes : int
        Number of nodes; node i has ``partition-id`` i.
    run_config : Mapping
        The run config that the app's context carries.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int, run_config: Mapping[str, Any]
    ) -> None:
        self.run_id = secrets.randbits(62)
        self._app = client_app
        self._contexts = {
            node_id: Context(
                run_id=self.run_id,
                node_id=node_id,
                node_config={"partition-id": partition, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition, node_id in enumerate(_node_ids(num_nodes))
        }
        self._replies: dict[str, Message] = {}
        # Legacy servers send from many threads, and clients share this process's one model.
        self._turn = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[LocalGrid]:
        """Give this process the identity that Flower's messages ask for, and take it back after."""
        before = {
            name: getattr(TaskIdentity, f"_{name}") for name in ("run_id", "node_id", "task_id")
        }
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 1, 1
        try:
            yield self
        finally:
            for name, value in before.items():
                setattr(TaskIdentity, f"_{name}", value)

    def context(self) -> Context:
        """Return a context for a `ServerApp` that runs on this grid."""
        config = next(iter(self._contexts.values())).run_config
        return Context(self.run_id, 1, {}, RecordDict(), dict(config))

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return Run.create_empty(self.run_id)

    def set_run(self, run: Run) -> None:
        """Take another run's identity, for the nodes too."""
        self.run_id = run.run_id
        for context in self._contexts.values():
            context.run_id = run.run_id

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, in no particular order."""
        return sorted(self._contexts)

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
        ids = []
        for message in messages:
            reply = self._serve(message)
            ids.append(str(uuid4()))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies to pushed messages, each once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull all replies; nothing can time out in one process."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _serve(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            with self._turn:
                return self._app(message, context)
        except Exception:  # As in Flower, a client's failure is its reply.
            return Message(Error(CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)


def _node_ids(count: int) -> list[int]:
    drawn: set[int] = set()
    while len(drawn) < count:
        drawn.add(secrets.randbits(62) + 2)
    return list(drawn)
