"""The table of all that may leave a device, why it may, and how each value is checked.

`account` compares it with what was recorded. What is not in the table is a fault.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora_flwr import wire
from tests.deploy.wire_fields import CALLS, PUSH, Packed, fields_of
from tests.deploy.wire_heard import EVALUATES, SIZE, UNPROTECTED, Heard
from tests.deploy.wire_tap import Call

PROTECTED, PUBLIC = "protected", "public"
OPTED, SIDE = "opted in", "side channel"
Fits = Callable[[Any, Heard, Call], bool]
FAILED = re.compile(
    r"<class 'fedlora_flwr\.errors\.ClientFailed'>:<'The client could not do what was asked "
    r"\(error [0-9a-f]{8}\)\. Its own log says why\.'>"
)
REFUSED = "<class 'fedlora_flwr.errors.OrderRefused'>:<'"
REFUSALS = (
    "This client does not evaluate. To let it, name a public test-split in its file.'>",
    "weighting = 'size' is refused, because this client does not tell the run its number of "
    "records or its noise. Use weighting = 'uniform', or set weighting on the client.'>",
)


@dataclass(frozen=True)
class Row:
    """Why something may leave, and whether a value is as it should be."""

    kind: str
    why: str
    fits: Fits


def told(value: Any, heard: Heard, call: Call) -> bool:
    return value in heard.told


def _message(value: Any, heard: Heard, call: Call) -> bool:
    return value in heard.told or value in heard.pulled


def _is(*values: Any) -> Fits:
    return lambda value, heard, call: value in values


def _like(pattern: str) -> Fits:
    return lambda value, heard, call: re.fullmatch(pattern, value) is not None


def _number(value: Any, heard: Heard, call: Call) -> bool:
    return isinstance(value, int | float) and value >= 0


def _if_opted(choice: str, otherwise: Fits | None = None) -> Fits:
    def fits(value: Any, heard: Heard, call: Call) -> bool:
        return choice in heard.opted or (otherwise is not None and otherwise(value, heard, call))

    return fits


def _line(value: Any, heard: Heard, call: Call) -> bool:
    return value == ("POST", f"/v1/fleet/{call.name}", "HTTP/1.1") and call.name in CALLS


def _when(value: Any, heard: Heard, call: Call) -> bool:
    began, ended = heard.times
    stamp = value if isinstance(value, float) else datetime.fromisoformat(value).timestamp()
    return began - 1 <= stamp <= ended + 1


def _signed(value: Any, heard: Heard, call: Call) -> bool:
    key = serialization.load_pem_public_key(heard.key)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    stamp = dict(call.request.headers)["flwr-timestamp"].encode()
    try:
        key.verify(base64.b64decode(value), stamp, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _pushed(value: Any, heard: Heard, call: Call) -> bool:
    return value in heard.pushed


def _object(value: Packed, heard: Heard, call: Call) -> bool:
    sent = CALLS[PUSH][0].FromString(call.request.body)
    return (
        value.id == sent.object_id
        and value.head[2] == len(value.body)
        and all(part in heard.pushed for part in value.parts)
    )


def _reason(value: Any, heard: Heard, call: Call) -> bool:
    refused = value.startswith(REFUSED) and value.removeprefix(REFUSED) in REFUSALS
    return refused or FAILED.fullmatch(value) is not None


_HTTP = {
    "request line": Row(PUBLIC, "The path of one of Flower's ten calls.", _line),
    "header host": Row(
        PUBLIC, "The server's address.", lambda v, heard, c: v == f"127.0.0.1:{heard.port}"
    ),
    "header accept-encoding": Row(PUBLIC, "The HTTP library's own.", _like("[a-z, ]+")),
    "header connection": Row(PUBLIC, "The HTTP library's own.", _is("keep-alive")),
    "header user-agent": Row(
        PUBLIC, "The HTTP library's name and version.", _like(r"python-httpx/[\d.]+")
    ),
    "header content-type": Row(PUBLIC, "The format.", _is("application/protobuf")),
    "header accept": Row(PUBLIC, "The format.", _is("application/protobuf")),
    "header content-length": Row(
        PUBLIC, "The length of the body.", lambda v, h, call: v == str(len(call.request.body))
    ),
    "header flwr-public-key": Row(
        PUBLIC, "The device's public key.", lambda v, heard, c: base64.b64decode(v) == heard.key
    ),
    "header flwr-timestamp": Row(SIDE, "The time of the call.", _when),
    "header flwr-signature": Row(PUBLIC, "The device's signature of that time.", _signed),
    "header flwr-package-name": Row(PUBLIC, "Installed software.", _is("flwr")),
    "header flwr-package-version": Row(PUBLIC, "Installed software.", _like(r"[\d.]+")),
    "header flwr-component-name": Row(PUBLIC, "Installed software.", _is("SuperNode")),
}
_NODE = Row(PUBLIC, "The number that the server gave the device.", told)
_RUN = Row(PUBLIC, "The run that the server named.", told)
_BEAT = Row(PUBLIC, "A constant of Flower's.", _is(30.0))
_ID = Row(PUBLIC, "The SHA-256 of an object that this table covers.", _pushed)
_METADATA = {
    "run_id": _RUN,
    "src_node_id": _NODE,
    "dst_node_id": Row(PUBLIC, "The server's number.", told),
    "reply_to_message_id": Row(PUBLIC, "The server's message.", _message),
    "message_type": Row(PUBLIC, "The type of the server's message.", told),
    "dst_task_id": Row(PUBLIC, "The server's number.", told),
    "created_at": Row(SIDE, "The time of the answer.", _when),
    "ttl": Row(SIDE, "The time that is left of the server's limit.", _number),
}
_ERROR = {
    "code": Row(PUBLIC, "Flower's number for any exception of a client.", _is(2)),
    "reason": Row(
        PUBLIC, "A refusal before records are opened, or a fixed sentence with a random number.",
        _reason,
    ),
}  # fmt: skip
_MESSAGE = {
    **{f"metadata.{name}": row for name, row in _METADATA.items()},
    **{f"error.{name}": row for name, row in _ERROR.items()},
}
_BODIES = {
    "activate-node.public_key": Row(
        PUBLIC, "The device's public key.", lambda v, heard, c: v == heard.key
    ),
    "activate-node.heartbeat_interval": _BEAT,
    "send-node-heartbeat.heartbeat_interval": _BEAT,
    "deactivate-node.node_id": _NODE,
    **{
        f"{name}.node.node_id": _NODE
        for name in CALLS
        if name not in ("activate-node", "deactivate-node")
    },
    **{
        f"{name}.run_id": _RUN
        for name in ("get-run", "get-fab", "pull-object", "push-object", "confirm-message-received")
    },
    "get-fab.hash_str": Row(PUBLIC, "The bundle that the server named.", told),
    "pull-object.object_id": Row(PUBLIC, "An object that the server named.", told),
    "confirm-message-received.message_object_id": Row(PUBLIC, "The server's message.", told),
    **{f"push-messages.messages_list.{name}": row for name, row in _MESSAGE.items()},
    "push-messages.messages_list.metadata.message_id": _ID,
    "push-messages.message_object_trees.object_id": _ID,
    "push-messages.message_object_trees.children.object_id": _ID,
    "push-messages.clientapp_runtime_list": Row(
        SIDE, "The time that the client took; Flower adds it.", _number
    ),
    "push-object.object_id": _ID,
    "push-object.session_id": Row(PUBLIC, "The server's number.", told),
}
_HEAD = Row(PUBLIC, "Kind and length of an object, and the ids of its parts.", _object)
_KINDS = ("Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "MetricRecord",
          "ConfigRecord")  # fmt: skip
_OBJECTS = {
    **{f"{kind}: id and head": _HEAD for kind in _KINDS},
    **{f"Message.{name}": row for name, row in _MESSAGE.items()},
    **{f"RecordDict.{name}": _ID for name in (wire.ARRAYS, wire.METRICS, wire.CONFIG)},
    "ArrayRecord.…": Row(
        PUBLIC, "The names of arrays that the order asks for.",
        lambda v, heard, c: v[0] in heard.names and v[1] in heard.pushed,
    ),
    "Array.dtype": Row(PUBLIC, "The exchanged type.", _is("float32")),
    "Array.shape": Row(
        PUBLIC, "As in the server's arrays.", lambda v, heard, c: tuple(v) in heard.shapes
    ),
    "Array.stype": Row(PUBLIC, "A constant of Flower's.", _is("numpy.ndarray")),
    "Array.arraychunk_ids": Row(
        PUBLIC, "The order of an array's parts.", lambda v, h, c: v == list(range(len(v)))
    ),
    "ArrayChunk.data": Row(
        PROTECTED, "Values that went through a private step.",
        lambda v, heard, c: v in {heard.pushed[part].body for part in heard.private},
    ),
}  # fmt: skip
_NUMBERS = {
    wire.EPSILON: Row(SIDE, "The account in the ledger, which tells σ and q, and so n.", _number),
    wire.EPSILON_BUDGET: Row(PUBLIC, "The device's file.", _is(3.0)),
    wire.DELTA: Row(PUBLIC, "The device's file.", _is(1e-4)),
    wire.STEPS: Row(PUBLIC, "The steps that runs have planned and rounds have taken.", _is(1, 2)),
    wire.SECONDS: Row(SIDE, "The time of the round.", _number),
    wire.PEAK_MEMORY: Row(SIDE, "The memory of the client's process.", _number),
    wire.WEIGHT: Row(
        OPTED, "1, unless the device's file allows a weighting.", _if_opted(SIZE, _is(1.0))
    ),
    wire.NUM_EXAMPLES: Row(
        OPTED, "0 or 1, unless the device's file allows weighting by size.",
        _if_opted(SIZE, _is(0, 1)),
    ),
    f"{wire.UNPROTECTED}…": Row(
        OPTED, "Only if the device's file sets report-unprotected-metrics.",
        _if_opted(UNPROTECTED),
    ),
    wire.LOSS: Row(OPTED, "Only if the device's file names a test-split.", _if_opted(EVALUATES)),
    "accuracy": Row(OPTED, "Only if the device's file names a test-split.", _if_opted(EVALUATES)),
}  # fmt: skip
_TEXTS = {
    wire.CLIENT: Row(PUBLIC, "The device's file.", lambda v, heard, c: v == heard.name),
    wire.STATUS: Row(
        PUBLIC, "The ledger's answer, which follows from settings.",
        _is(wire.STATUS_OK, wire.STATUS_EXHAUSTED),
    ),
    wire.ACCOUNTANT: Row(PUBLIC, "How ε is counted.", _is("prv", "rdp", "rdp-filter")),
}  # fmt: skip
TABLE: dict[str, Row] = {
    **_HTTP,
    **_BODIES,
    **_OBJECTS,
    **{f"MetricRecord.{name}": row for name, row in _NUMBERS.items()},
    **{f"ConfigRecord.{name}": row for name, row in _TEXTS.items()},
}
# Their values are compared with the body or the clock, and may have any digits.
_COMPARED = ("header content-length", "header flwr-timestamp", "header flwr-signature")


def account(heard: Heard, seen: Counter[str], table: Mapping[str, Row] | None = None) -> list[str]:
    """Return all that a device sent and should not have sent; count each place in ``seen``."""
    known = TABLE if table is None else table
    faults = []
    for call in heard.calls:
        for place, value in fields_of(call):
            seen[place] += 1
            row = known.get(place)
            if row is None:
                faults.append(f"{heard.name}: {place} is in no row: {str(value)[:200]}")
            elif not row.fits(value, heard, call):
                faults.append(f"{heard.name}: {place} has {str(value)[:200]}")
            elif tells(value, heard.records) and place not in _COMPARED and SIZE not in heard.opted:
                faults.append(f"{heard.name}: {place} tells the number of records")
    return faults


def tells(value: Any, number: int) -> bool:
    """Tell whether a value is a number, or a text or a collection that holds it."""
    if isinstance(value, str):
        return re.search(rf"(?<!\w)(?<!\d\.){number}(?!\w|\.\d)", value) is not None
    if isinstance(value, list | tuple):
        return any(tells(one, number) for one in value)
    return isinstance(value, int | float) and value == number


def disguises(mark: str) -> set[bytes]:
    """Return a word as it would look in the usual encodings."""
    plain = mark.encode()
    found = {plain, plain.upper(), plain.hex().encode(), mark.encode("utf-16-le"), plain[::-1]}
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + plain)
        found.add(coded[(0, 2, 3)[before] : len(coded) - 4])
    return found


def page(rows: Iterable[tuple[str, Row]]) -> str:
    """Write rows as a table of Markdown."""
    lines = [f"| `{place}` | {row.kind} | {row.why} |" for place, row in rows]
    return "\n".join(["| what | kind | why it may leave |", "|---|---|---|", *lines])
