"""A curious server: after an honest agreement on masks it sends each device an order of its own.

A server ships the package's bundle and runs this `ServerApp` in its place. It reads from a folder
what an honest round has sent, and writes there what each device has answered.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedlora_flwr.secure_sum.party import SEALED_BYTES, pieces
from fedlora_flwr.wire import (
    ARRAYS,
    CLIENT,
    CONFIG,
    OPEN_SUM,
    PACKET,
    SEAL_SHARES,
    SHOW_KEYS,
    STAGE,
    UPLOAD,
    WEIGHTING,
)
from tests.deploy.curious_path import FOLDER, READY

START, ORDER, TOLD = "start.npz", READY, "told.json"
EVALUATED, DOUBLED, OPENED, SIZED = (
    "evaluate", "two configurations", "open before the upload", "weights by size"
)  # fmt: skip
"""What the devices are asked, in the order of their names."""
app = ServerApp()
Config = Mapping[str, Any]


def prepare(folder: Path, start: Mapping[str, NDArray[Any]], order: Config) -> None:
    """Write what an honest server has sent with the upload's order."""
    arrays: Any = start
    np.savez(folder / START, **arrays)
    words = {key: value for key, value in order.items() if key not in (STAGE, PACKET)}
    (folder / ORDER).write_text(json.dumps(words))


@app.main()
def ask(grid: Grid, context: Context) -> None:
    """Agree on masks, ask each device something else, and write down the answers."""
    folder = Path(os.environ[FOLDER])
    order: dict[str, Any] = json.loads((folder / ORDER).read_text())
    with np.load(folder / START) as stored:
        start = {name: stored[name] for name in stored.files}
    while len(nodes := list(grid.get_node_ids())) < 4:
        time.sleep(0.5)
    shown = _answers(grid, [_message(n, {**order, STAGE: SHOW_KEYS}) for n in nodes])
    places = sorted(nodes, key=lambda node: str(_words(shown[node])[CLIENT]))
    cards = b"".join(_packet(shown[node]) for node in places)
    agreed = {**order, STAGE: SEAL_SHARES, PACKET: cards}
    sealed = _answers(grid, [_message(node, agreed) for node in places])
    kept = [pieces(_packet(sealed[node]), SEALED_BYTES) for node in places]
    mine = [b"".join(each[place] for each in kept) for place in range(4)]
    upload = [{**order, STAGE: UPLOAD, PACKET: packet} for packet in mine]
    doubled = _message(places[1], upload[1], start=start)
    doubled.content["again"] = ConfigRecord(dict(order))
    questions = {
        EVALUATED: _message(places[0], upload[0], "evaluate", start),
        DOUBLED: doubled,
        OPENED: _message(places[2], {**order, STAGE: OPEN_SUM, PACKET: b"\1\1\1\1"}),
        SIZED: _message(places[3], {**upload[3], WEIGHTING: "size"}, start=start),
    }
    replies = _answers(grid, list(questions.values()))
    told = {
        name: replies[node].error.reason if replies[node].has_error() else "answered"
        for name, node in zip(questions, places, strict=True)
    }
    (folder / TOLD).write_text(json.dumps(told))


def _message(
    node: int, config: Config, kind: str = "train", start: Mapping[str, NDArray[Any]] | None = None
) -> Message:
    arrays = ArrayRecord({name: Array(values) for name, values in (start or {}).items()})
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(dict(config))})
    return Message(content, node, kind)


def _answers(grid: Grid, questions: list[Message]) -> dict[int, Message]:
    return {
        reply.metadata.src_node_id: reply for reply in grid.send_and_receive(questions, timeout=240)
    }


def _words(reply: Message) -> Config:
    return dict(reply.content[CONFIG])


def _packet(reply: Message) -> bytes:
    return bytes(_words(reply)[PACKET])
