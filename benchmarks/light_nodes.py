"""Many SuperNodes in one process, which `benchmarks.load` starts.

Each has a key, a TLS connection and heartbeats of its own, and does what Flower's SuperNode does:
it asks for messages every three seconds, pulls a message's objects one by one, confirms them, and
pushes its answer's. Only the process for the app is missing. The arrays that came are answered at
once.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Message, MessageType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supernode.fleet_http_connection import http_request_response

from fedlora_flwr.wire.records import query_records, read_order, train_records
from fedlora_flwr.wire.report import Report

PAUSE = 3.0
"""Seconds between two questions for messages, as in Flower's SuperNode."""
CONNECTED, ASKED = "is connected", "questions so far from"


class LightNode:
    """One SuperNode.

    Parameters
    ----------
    name : str
        The client's name.
    connect : callable
        Flower's own connection of a SuperNode.
    """

    asked: ClassVar[int] = 0
    """How often the nodes of this process have asked for messages."""

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self._name, self._connect, self._steps = name, connect, 0
        self._runs: set[int] = set()

    def serve(self) -> None:
        """Answer messages for as long as the process lives; connect again where that fails."""
        while True:
            try:
                with self._connect() as connection:
                    print(f"{self._name}: {CONNECTED}", flush=True)
                    while True:
                        if not self._answer_one(*connection[1:]):
                            time.sleep(PAUSE)
            except (Exception, SystemExit) as error:
                print(f"{self._name}: {type(error).__name__}: {error}", flush=True)
            time.sleep(PAUSE)

    def _answer_one(self, *calls: Callable[..., Any]) -> bool:
        receive, send, get_run, get_fab, pull, push, confirm = calls
        received = receive()
        LightNode.asked += 1  # Of many threads; one lost in a thousand does no harm.
        if received is None:
            return False
        message, tree = received
        run = message.metadata.run_id
        if run not in self._runs:
            get_fab(get_run(run).fab_hash, run)
            self._runs.add(run)
        wanted = [one.object_id for one in iterate_object_tree(tree)]
        contents = pull_objects(wanted, pull_object_fn=partial(pull, run))
        confirm(run, message.metadata.message_id)
        whole = inflate_object_from_contents(message.metadata.message_id, contents)
        assert isinstance(whole, Message)
        reply = Message(self._content(message, whole), reply_to=message)
        vars(reply.metadata)["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        missing, session = send(reply, get_object_tree(reply), 0.1)
        push_object_contents_from_iterable(
            ((name, one.deflate()) for name, one in objects.items() if name in missing),
            push_object_fn=partial(push, run, session),
        )
        return True

    def _content(self, message: Message, whole: Message) -> Any:
        if message.metadata.message_type == MessageType.QUERY:
            return query_records(Report(client=self._name))
        _, arrays = read_order(whole.content)
        self._steps += 1
        return train_records(
            Report(
                client=self._name, status="ok", arrays=_other(arrays), epsilon=1.0,
                epsilon_budget=8.0, delta=1e-5, accountant="prv", steps=self._steps,
                seconds=0.1, weight=1.0, num_examples=1,
            )
        )  # fmt: skip


def _other(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return other values, as no two devices send the same bytes."""
    return {name: array + random.random() * 1e-3 for name, array in arrays.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Be many SuperNodes at once, until this process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.light_nodes", description=main.__doc__
    )
    parser.add_argument("address", help="the SuperLink's")
    parser.add_argument("authority", type=Path, help="certificate of its authority")
    parser.add_argument("first", type=int, help="number of the first node")
    parser.add_argument("count", type=int, help="how many nodes")
    given = parser.parse_args(argv)
    connect = partial(http_request_response, given.address, False, str(given.authority))
    for number in range(given.first, given.first + given.count):
        node = LightNode(f"node-{number:05d}", connect)
        threading.Thread(target=node.serve, daemon=True).start()
        time.sleep(0.02)  # A fleet does not start in the same instant.
    while True:
        time.sleep(1.0)
        print(f"{LightNode.asked} {ASKED} {given.first}", flush=True)


if __name__ == "__main__":
    main()
