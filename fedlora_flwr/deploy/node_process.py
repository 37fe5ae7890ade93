"""The program of a device's SuperNode: Flower's own, with two of its gaps closed.

Flower's SuperNode sends any answer that is ready when it has received a message. If a run ends
while the device receives one of its messages, that message's answer stays ready, and goes out in
place of the next message's. From then on each answer comes one message late, so each round waits
for this device in vain. Here the SuperNode waits for the answer to what it was asked.

Flower's SuperNode does not notice that its SuperExec has died, without which no message is
answered. Here it ends as well, so that the device's unit starts both again.

Source: flwr 1.42, ``supernode/start_client_internal.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from fedlora_flwr.deploy.children import end_with_children
from fedlora_flwr.deploy.flower import SUPERNODE, OtherFlower, module_of, program

_LOOP = "flwr.supernode.start_client_internal"
_RECEIVE, _SEND = "_pull_and_store_message", "_push_messages"


class InOrder:
    """Two functions of Flower's SuperNode, around its own.

    Parameters
    ----------
    receive : callable
        Flower's function that receives a message.
    send : callable
        Flower's function that waits for answers and sends all that are ready.
    """

    def __init__(self, receive: Callable[..., Any], send: Callable[..., None]) -> None:
        self._receive, self._send = receive, send
        self._asked = ""

    def receive(self, *, receive: Callable[[], Any], **rest: Any) -> Any:
        """Receive a message, and note which it is."""

        def noted() -> Any:
            found = receive()
            self._asked = found[0].metadata.message_id if found else ""
            return found

        return self._receive(receive=noted, **rest)

    def send(self, *, state: Any, **rest: Any) -> None:
        """Send answers until that to the message is among them."""
        answers = _Answers(state)
        while self._asked not in answers.to:
            self._send(state=answers, **rest)


class _Answers:
    """A SuperNode's state that notes which answers are taken from it."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.to: set[str] = set()

    def get_messages_legacy(self, **which: Any) -> Any:
        found = self._state.get_messages_legacy(**which)
        self.to |= {message.metadata.reply_to_message_id for message in found}
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def answer_in_order() -> None:
    """Put `InOrder` around Flower's two functions, for the rest of this process.

    Raises
    ------
    OtherFlower
        They are not where they are expected, or take other arguments.
    """
    loop = module_of(_LOOP)
    for name, argument in ((_RECEIVE, "receive"), (_SEND, "state")):
        function = getattr(loop, name, None)
        if not callable(function) or argument not in inspect.signature(function).parameters:
            raise OtherFlower(f"{_LOOP} has no {name} that takes {argument}")
    order = InOrder(getattr(loop, _RECEIVE), getattr(loop, _SEND))
    setattr(loop, _RECEIVE, order.receive)
    setattr(loop, _SEND, order.send)


def main() -> None:
    """Be a SuperNode."""
    sys.argv[0] = SUPERNODE
    run = program(SUPERNODE)
    answer_in_order()
    end_with_children("This device's SuperExec has ended, so its SuperNode ends too.")
    sys.exit(run())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
