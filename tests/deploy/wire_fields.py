"""The fields of what a device sends: of HTTP, of protobuf, and of Flower's objects.

A field has a place, which a row of `tests.deploy.wire_table` must name, and a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, recorddict_pb2, run_pb2
from google.protobuf.message import Message  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import (  # type: ignore[import-untyped]
    UnknownFieldSet,
)

from fedlora_flwr.wire import UNPROTECTED
from tests.deploy.wire_tap import Call

Field = tuple[str, Any]
PUSH, PULL = "push-object", "pull-object"
CALLS: dict[str, tuple[type[Message], type[Message]]] = {
    "activate-node": (fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse),
    "send-node-heartbeat": (
        heartbeat_pb2.SendNodeHeartbeatRequest, heartbeat_pb2.SendNodeHeartbeatResponse
    ),
    "pull-messages": (fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse),
    "push-messages": (fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse),
    "get-run": (run_pb2.GetRunRequest, run_pb2.GetRunResponse),
    "get-fab": (fab_pb2.GetFabRequest, fab_pb2.GetFabResponse),
    PUSH: (message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
    PULL: (message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    "confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest, message_pb2.ConfirmMessageReceivedResponse
    ),
}  # fmt: skip
_PROTOBUF: dict[str, type[Message]] = {
    "Message": message_pb2.Message,
    "MetricRecord": recorddict_pb2.MetricRecord,
    "ConfigRecord": recorddict_pb2.ConfigRecord,
}
_CONTENT = "object_content"


@dataclass(frozen=True)
class Packed:
    """An object as Flower sends it: its kind, the ids of its parts, and its body."""

    content: bytes

    @cached_property
    def head(self) -> tuple[str, list[str], int]:
        kind, parts, length = self.content.partition(b"\0")[0].decode().split(" ")
        return kind, parts.split(",") if parts else [], int(length)

    @property
    def kind(self) -> str:
        return self.head[0]

    @property
    def parts(self) -> list[str]:
        return self.head[1]

    @property
    def body(self) -> bytes:
        return self.content.partition(b"\0")[2]

    @property
    def id(self) -> str:
        return sha256(self.content).hexdigest()

    def items(self) -> dict[str, Any]:
        """Return a record's entries, or the ids of its parts by their names."""
        if self.kind not in _PROTOBUF:
            found: dict[str, Any] = json.loads(self.body)
            return found
        return {item.key: _scalar(item.value) for item in self.message().items}

    def message(self) -> Any:
        return _PROTOBUF[self.kind].FromString(self.body)


def fields_of(call: Call) -> Iterator[Field]:
    """Yield everything in a request."""
    method, path, version = call.request.first.split(" ")
    yield "request line", (method, path, version)
    for name, value in call.request.headers:
        yield f"header {name}", value
    if call.name not in CALLS:
        yield call.name, call.request.body
        return
    body = CALLS[call.name][0].FromString(call.request.body)
    yield from _said(body, call.name, call.request.body)


def _said(message: Message, name: str, raw: bytes) -> Iterator[Field]:
    """Yield a message's fields, and those of the object that it carries."""
    for place, value in _walk(message, name):
        if place.endswith(f".{_CONTENT}"):
            yield from object_fields(Packed(value))
        else:
            yield place, value
    # The same fields in their order are the same bytes, so nothing is hidden between them.
    if message.SerializeToString(deterministic=True) != raw:
        yield f"{name}: other bytes", raw


def _walk(message: Message, place: str) -> Iterator[Field]:
    for unknown in UnknownFieldSet(message):
        yield f"{place}.{unknown.field_number}", unknown.data
    for about, value in message.ListFields():
        name = re.sub(r"(\.children)+", ".children", f"{place}.{about.name}")
        if isinstance(value, Mapping):
            yield from ((name, one) for pair in value.items() for one in pair)
        elif about.message_type:
            inner = [value] if isinstance(value, Message) else value
            for one in inner:
                yield from _walk(one, name)
        else:
            single = isinstance(value, str | bytes | int | float)
            yield from ((name, one) for one in ([value] if single else value))


def object_fields(found: Packed) -> Iterator[Field]:
    """Yield the fields of an object."""
    kind = found.kind
    yield f"{kind}: id and head", found
    if kind == "Message":
        message = found.message()
        yield from _walk(message, kind)
        if message.SerializeToString(deterministic=True) != found.body:
            yield f"{kind}: other bytes", found.body
    elif kind in _PROTOBUF:
        for key, value in found.items().items():
            known = f"{UNPROTECTED}…" if key.startswith(UNPROTECTED) else key
            yield f"{kind}.{known}", value
        again = found.message().SerializeToString()
        if again != found.body:
            yield f"{kind}: other bytes", found.body
    elif kind == "ArrayRecord":
        yield from ((f"{kind}.…", item) for item in found.items().items())
    elif kind in ("RecordDict", "Array"):
        yield from ((f"{kind}.{key}", value) for key, value in found.items().items())
    else:
        yield f"{kind}.data", found.body


def _scalar(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


def objects_of(calls: list[Call], name: str) -> dict[str, Packed]:
    """Return all objects that a device has pushed (`PUSH`) or pulled (`PULL`), by id."""
    found = {}
    for call in calls:
        if call.name == name:
            carries = call.request if name == PUSH else call.answer
            if carries is not None:
                content = CALLS[name][name == PULL].FromString(carries.body).object_content
                if content:
                    found[Packed(content).id] = Packed(content)
    return found


def told_by_server(calls: list[Call]) -> set[Any]:
    """Return every number and text that the server has sent to a device."""
    told: set[Any] = set()
    for call in calls:
        if call.answer is not None and call.name in CALLS and " 200 " in f"{call.answer.first} ":
            answer = CALLS[call.name][1].FromString(call.answer.body)
            for _, value in _said(answer, call.name, call.answer.body):
                if isinstance(value, str | int | float):
                    told.add(value)
    return told
