"""A device's SuperNode answers what it was asked, and ends with its SuperExec."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory

from fedlora_flwr.deploy import node_process
from fedlora_flwr.deploy.flower import OtherFlower
from fedlora_flwr.wire.identity import acting_for


class Node:
    """Flower's loop with its real state, between a server and a client that a test plays."""

    def __init__(self) -> None:
        factory = ObjectStoreFactory()
        self.store = factory.store()
        self.state = NodeStateFactory(factory).state()
        self.state.set_node_id(1)
        self.sent: list[str] = []

    def receive(self, message: Message, confirm: Callable[..., None]) -> int | None:
        """Receive a message of a run that Flower knows."""
        objects = get_all_nested_objects(message)
        found: int | None = loop._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=Run.create_empty,
            get_fab=lambda *_: Fab("", b"", {}),
            pull_object=lambda _, name: objects[name].deflate(),
            confirm_message_received=confirm,
            trusted_entities=None,
        )
        return found

    def answer(self, message: Message, after: float = 0.0) -> None:
        """Answer as a client does that takes so long."""
        time.sleep(after)
        with acting_for(message.metadata.run_id):
            reply = Message(RecordDict(), reply_to=message)
        loop._insert_message(reply, self.state, self.store)

    def send(self) -> None:
        def push(message: Message, *_: object) -> tuple[set[str], str]:
            self.sent.append(message.metadata.reply_to_message_id)
            return set(), ""

        loop._push_messages(
            state=self.state, object_store=self.store, send=push, push_object=lambda *_: None
        )


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def in_order() -> Iterator[None]:
    before = loop._pull_and_store_message, loop._push_messages
    node_process.answer_in_order()
    yield
    loop._pull_and_store_message, loop._push_messages = before


def asked(run: int) -> Message:
    with acting_for(run):
        message = Message(RecordDict({"n": ConfigRecord({"run": run})}), 1, "train")
        vars(message.metadata)["_message_id"] = message.object_id
        return message


def ended(*_: object) -> None:
    raise RunNotRunningException


def play(node: Node) -> tuple[str, str]:
    """Lose a run while its message is received; then answer a message of the next run."""
    old, new = asked(1), asked(2)
    for run in (1, 2):
        node.state.store_run(Run.create_empty(run))
    assert node.receive(old, ended) is None
    node.answer(old)
    assert node.receive(new, lambda *_: None) == 2
    late = threading.Thread(target=node.answer, args=(new, 1.0))
    late.start()
    node.send()
    late.join()
    return old.metadata.message_id, new.metadata.message_id


def test_an_answer_that_nobody_waits_for_does_not_take_the_place_of_the_next(
    node: Node, in_order: None
) -> None:
    old, new = play(node)
    assert node.sent == [old, new]


def test_flower_alone_answers_one_message_late(node: Node) -> None:
    """If this fails, Flower has closed the gap, and `InOrder` can go."""
    old, _ = play(node)
    assert node.sent == [old]


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_push_messages", lambda messages: None)
    with pytest.raises(OtherFlower, match="no _push_messages that takes state"):
        node_process.answer_in_order()


def test_a_process_ends_with_its_child() -> None:
    parent = """
import subprocess, sys, time
from fedlora_flwr.deploy.children import end_with_children
end_with_children("A child has ended.")
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
time.sleep(3)
print("both live", flush=True)
child.kill()
time.sleep(600)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -15
    assert "both live" in done.stdout
    assert "A child has ended." in done.stdout + done.stderr
