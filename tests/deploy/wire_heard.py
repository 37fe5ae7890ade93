"""What the server told a device, and which uploads of the device went through a private step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.wire import ARRAYS, CONFIG
from fedlora_flwr.wire.order import Order
from tests.deploy.wire_fields import PULL, PUSH, Packed, objects_of, told_by_server
from tests.deploy.wire_tap import Call

SIZE, UNPROTECTED, EVALUATES = "weighting by size", "unprotected metrics", "a test split"
# The root mean square of 64 normal draws is below this less than once in a million times.
_LEAST, _ENOUGH = 0.6, 64
Arrays = dict[str, NDArray[np.float32]]


@dataclass
class Heard:
    """All that came from one device, and what is known of it.

    Parameters
    ----------
    name : str
        What the device's file calls it.
    records : int
        The number of its private records.
    opted : frozenset of str
        What its file allows.
    port : int
        The port that it takes for its server's.
    key : bytes
        Its public key, in PEM.
    calls : list of Call
        What it sent, and the answers.
    sent : bytes
        Every byte that it sent.
    times : (float, float)
        When the recording began and ended.
    noise : list of float
        The standard deviation of the noise in each of its uploads, as its ledger has it.
    addresses, ends
        Where its processes connected to, from Python and from the kernel.
    """

    name: str
    records: int
    opted: frozenset[str]
    port: int
    key: bytes
    calls: list[Call]
    sent: bytes
    times: tuple[float, float]
    noise: list[float]
    addresses: list[str] = field(default_factory=list)
    ends: set[tuple[str, int]] = field(default_factory=set)

    @cached_property
    def told(self) -> set[Any]:
        return told_by_server(self.calls)

    @cached_property
    def pushed(self) -> dict[str, Packed]:
        return objects_of(self.calls, PUSH)

    @cached_property
    def pulled(self) -> dict[str, Packed]:
        return objects_of(self.calls, PULL)

    @cached_property
    def names(self) -> set[str]:
        """Names of arrays that the server has sent."""
        records = [one for one in self.pulled.values() if one.kind == "ArrayRecord"]
        return {name for record in records for name in record.items()}

    @cached_property
    def shapes(self) -> set[tuple[int, ...]]:
        """Shapes of arrays that the server has sent."""
        arrays = [one for one in self.pulled.values() if one.kind == "Array"]
        return {tuple(array.items()["shape"]) for array in arrays}

    @cached_property
    def replies(self) -> list[tuple[Order, Arrays, Arrays, list[str]]]:
        """Order, arrays that came, arrays that left, and the latter's parts, for each upload."""
        found = []
        for reply in self.pushed.values():
            if reply.kind != "Message" or not reply.parts:
                continue
            names = part_of(self.pushed, reply, ARRAYS)
            if names is None or not names.parts:
                continue
            asked = self.pulled[reply.message().metadata.reply_to_message_id]
            config = part_of(self.pulled, asked, CONFIG)
            start = part_of(self.pulled, asked, ARRAYS)
            assert config is not None
            assert start is not None
            before, after = arrays_of(self.pulled, start), arrays_of(self.pushed, names)
            parts = [part for each in names.parts for part in self.pushed[each].parts]
            found.append((Order.from_config(config.items()), before, after, parts))
        return found

    @cached_property
    def private(self) -> set[str]:
        """The ids of the parts of arrays that the order asked for and that carry the noise."""
        if len(self.replies) != len(self.noise):
            return set()
        return {
            part
            for (order, start, made, parts), noise in zip(self.replies, self.noise, strict=True)
            if asked_for(order, start, made) and carries(start, made, noise)
            for part in parts
        }


def part_of(objects: Mapping[str, Packed], message: Packed, name: str) -> Packed | None:
    record = objects[message.parts[0]].items().get(name)
    return None if record is None else objects[record]


def arrays_of(objects: Mapping[str, Packed], record: Packed) -> Arrays:
    """Return a record's arrays by their names, each of the type and shape that it states."""
    found = {}
    for name, array in record.items().items():
        about = objects[array].items()
        order = [objects[array].parts[number] for number in about["arraychunk_ids"]]
        stream = BytesIO(b"".join(objects[part].body for part in order))
        values = np.load(stream, allow_pickle=False)
        assert (str(values.dtype), list(values.shape)) == (about["dtype"], about["shape"])
        assert not stream.read()
        found[name] = values
    return found


def asked_for(order: Order, start: Arrays, made: Arrays) -> bool:
    """Tell whether names and shapes of an upload are those that the order asks for."""
    trained = Layout.of(start).trained(ComponentPlan.parse(order.plan), 1)
    wanted = {name for name in trained if order.leaves(name)}
    return made.keys() == wanted and all(made[n].shape == start[n].shape for n in made)


def carries(start: Arrays, made: Arrays, noise: float) -> bool:
    """Tell whether every entry differs from the server's, and all arrays by the noise at least."""
    for name, values in made.items():
        change = values - start[name]
        small = values.size >= _ENOUGH and float(np.sqrt(np.mean(change**2))) < _LEAST * noise
        if small or not change.all():
            return False
    return True


def read_key(file: Path) -> bytes:
    """Return a public key of OpenSSH as PEM."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_ssh_public_key(file.read_bytes())
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
