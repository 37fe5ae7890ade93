"""One round of devices' own clients, each in a process that may be told to die at a point of it.

    python -m tests.deploy.dying RUN_ID RUN.toml DEVICE.toml=POINT ...

A client prints a line of JSON when its reply is on its way: whose it is, and what its ledger says.
A line follows with how its process ended.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedlora_flwr.client_app import app
from fedlora_flwr.clients.device import Device
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalTrainer, process_trainer
from fedlora_flwr.config import read_toml
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.ledger_file import Writer
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies.replies import to_record

NEVER = "never"
REPLIED = "with the reply on its way"
NODE = 2


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("A killed process goes on.")


def before(owner: type, name: str) -> Callable[[], None]:
    return lambda: setattr(owner, name, die)


def after(owner: type, name: str) -> Callable[[], None]:
    work: Callable[..., object] = getattr(owner, name)

    def then_die(*args: object, **kwargs: object) -> None:
        work(*args, **kwargs)
        die()

    return lambda: setattr(owner, name, then_die)


def with_pages_on_the_disk() -> None:
    """Die when SQLite has begun to overwrite the file, and has not committed."""

    def insert(db: sqlite3.Connection, *args: Any) -> None:
        # What a transaction changes goes to the file early where the cache has no room for it.
        db.execute("PRAGMA cache_size = 1")
        for _ in range(2_000):
            inserted(db, *args)
        die()

    inserted = Writer._insert
    Writer._insert = staticmethod(insert)  # type: ignore[method-assign,assignment]


POINTS: dict[str, Callable[[], None]] = {
    "before training": before(LocalTrainer, "train"),
    "after a step": after(PrivateEngine, "step"),
    "before the row": before(Ledger, "record"),
    "in the ledger's transaction": with_pages_on_the_disk,
    "after the row": before(LocalStore, "keep"),
    "with all written": after(LocalStore, "keep"),
    REPLIED: lambda: None,
    NEVER: lambda: None,
}


def serve(device: Path, run: dict[str, Any], run_id: int) -> dict[str, object]:
    """Ask for a round that keeps B with the device, as a SuperNode hands it to the app."""
    start = process_trainer(Device.read(device).config(run)).start
    asked = ConfigRecord({"plan": "*", "share": "A", "server-round": 1})
    factors = {name: array for name, array in start.items() if "lora_A" in name}
    content = RecordDict({"arrays": to_record(factors), "config": asked})
    with LocalGrid(app, 1, {}).running():
        message = Message(content, NODE, MessageType.TRAIN)
        reply = app(message, Context(run_id, NODE, {"device": str(device)}, RecordDict(), run))
    metrics = reply.content.metric_records["metrics"]
    who = reply.content.config_records["config"]["client"]
    return {"client": who, "epsilon": metrics["epsilon"], "steps": metrics["steps"]}


def work(device: Path, point: str, run: dict[str, Any], run_id: int) -> NoReturn:
    POINTS[point]()
    print(json.dumps(serve(device, run, run_id)), flush=True)
    if point == REPLIED:
        die()
    os._exit(0)


def main(run_id: str, run: str, *jobs: str) -> None:
    # What takes long is to import; every client is a process, model and ledger of its own.
    for device, _, point in (job.partition("=") for job in jobs):
        if not (child := os.fork()):
            work(Path(device), point, read_toml(Path(run)), int(run_id))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"ended": ended}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
