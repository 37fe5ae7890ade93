"""A node that counts; its module loads neither torch nor a model, so that workers start soon."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

from flwr.app import ConfigRecord, Context, Message, RecordDict


def count(message: Message, context: Context) -> Message:
    """Answer how often the node was asked, and by which process it is served."""
    if message.content.config_records["config"].get("die"):
        os._exit(3)
    seen = context.state.config_records.setdefault("seen", ConfigRecord({"count": 0}))
    seen["count"] = int(str(seen["count"])) + 1
    answer = ConfigRecord({"count": seen["count"], "process": os.getpid()})
    return Message(RecordDict({"config": answer}), reply_to=message)


def send_half(number: int) -> bytes:
    """Have the first worker die in the middle of its result, while the other one works."""
    if number:
        time.sleep(1.0)
        return b""

    def half(self: Connection, content: bytes, write: object = None) -> None:
        os.write(self.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half  # type: ignore[attr-defined]
    return bytes(1000)


def slow(seconds: float) -> None:
    time.sleep(seconds)
