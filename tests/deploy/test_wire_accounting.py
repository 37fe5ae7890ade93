"""The accounting of what devices send, on messages that are made up: it finds each kind of leak."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedlora_flwr.wire import ARRAYS, CONFIG
from fedlora_flwr.wire.identity import acting_for
from fedlora_flwr.wire.order import Order
from fedlora_flwr.wire.records import train_records
from fedlora_flwr.wire.report import Report
from tests.deploy.wire_files import table_of_files
from tests.deploy.wire_heard import SIZE, Heard
from tests.deploy.wire_table import TABLE, Row, account, disguises, page, tells
from tests.deploy.wire_tap import Call, NotHTTP, Talk, calls_of, halves

PAGE = Path(__file__).parents[2] / "docs" / "wire.md"
NAMES = [f"fc.lora_{factor}.weight" for factor in "AB"]
KEY = ec.derive_private_key(1013, ec.SECP384R1())
PEM = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
WHEN, RECORDS, NOISE, RUN, NODE = "2030-01-01T00:00:00+00:00", 1013, 0.1, 2**60 + 1, 2**61 + 1
START = {name: np.zeros((8, 16), np.float32) for name in NAMES}
SENT = Report(client="device-01", status="ok", steps=1, weight=1.0, num_examples=1)


def noisy(seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, NOISE, (8, 16)).astype(np.float32) for name in NAMES}


def request(name: str, body: bytes, **more: str) -> bytes:
    signature = base64.b64encode(KEY.sign(WHEN.encode(), ec.ECDSA(hashes.SHA256()))).decode()
    headers = {
        "host": "127.0.0.1:9443", "content-length": str(len(body)), "flwr-timestamp": WHEN,
        "flwr-signature": signature, **more,
    }  # fmt: skip
    lines = [f"POST /v1/fleet/{name} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def objects(message: Message) -> dict[str, bytes]:
    found = {id_: each.deflate() for id_, each in get_all_nested_objects(message).items()}
    return dict(reversed(found.items()))


def talk(reply: Report | Error, plan: str = "*", **headers: str) -> Talk:
    """Return a round: the server's message with an order, and a device's answer."""
    order = Order(plan=plan, server_round=1).to_config()
    arrays = ArrayRecord({name: Array(values) for name, values in START.items()})
    with acting_for(RUN, 1):
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(dict(order))})
        asked = Message(content, NODE, MessageType.TRAIN)
        vars(asked.metadata)["_message_id"] = asked.object_id
    with acting_for(RUN, NODE):
        told = reply if isinstance(reply, Error) else train_records(reply)
        answered = Message(told, reply_to=asked)
        answered.metadata.__dict__["_created_at"] = 1893456000.0
    found = Talk()
    for content_ in objects(asked).values():
        found.sent += request("pull-object", message_pb2.PullObjectRequest().SerializeToString())
        pulled = message_pb2.PullObjectResponse(object_found=True, object_content=content_)
        found.answered += answer(pulled.SerializeToString(deterministic=True))
    for id_, content_ in objects(answered).items():
        pushed = message_pb2.PushObjectRequest(object_id=id_, object_content=content_)
        found.sent += request(
            "push-object", pushed.SerializeToString(deterministic=True), **headers
        )
        found.answered += answer(b"")
    return found


def heard(said: Talk, **changes: Any) -> Heard:
    calls, sent = calls_of(said), bytes(said.sent)
    times = (1893450000.0, 1893460000.0)
    about = Heard("device-01", RECORDS, frozenset(), 9443, PEM, calls, sent, times, [NOISE])
    return replace(about, **changes)


def faults(said: Talk, **changes: Any) -> list[str]:
    return account(heard(said, **changes), Counter())


def test_what_an_honest_device_sends_is_in_the_table() -> None:
    assert faults(talk(replace(SENT, arrays=noisy()))) == []
    assert faults(talk(replace(SENT, arrays={NAMES[1]: noisy()[NAMES[1]]}), "B")) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"measured": {"n": 1013}}, "MetricRecord.n is in no row: 1013"),
        ({"notes": {"sample": "zyxquark"}}, "ConfigRecord.sample is in no row: zyxquark"),
        ({"num_examples": 1013}, "MetricRecord.num-examples has 1013"),
        ({"weight": 1013.0}, "MetricRecord.weight has 1013.0"),
        ({"seconds": 1013.0}, "MetricRecord.seconds tells the number of records"),
        ({"unprotected": {"loss": 0.7}}, "MetricRecord.unprotected-… has 0.7"),
        ({"measured": {"loss": 0.7}}, "MetricRecord.loss has 0.7"),
        ({"client": "zyxquark"}, "ConfigRecord.client has zyxquark"),
    ],
)
def test_what_a_report_must_not_tell_is_found(change: dict[str, Any], fault: str) -> None:
    assert faults(talk(replace(SENT, arrays=noisy(), **change))) == [f"device-01: {fault}"]


def test_a_device_may_tell_what_its_file_allows() -> None:
    sized = talk(replace(SENT, arrays=noisy(), num_examples=1013, weight=1013.0))
    assert faults(sized, opted=frozenset({SIZE})) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: {n: 0.01 * a for n, a in made.items()},
        lambda made: {n: np.where(a > 0.2, 0, a).astype(np.float32) for n, a in made.items()},
        lambda made: {**made, NAMES[0]: START[NAMES[0]]},
        lambda made: {n: np.ascontiguousarray(a.T) for n, a in made.items()},
        lambda made: {NAMES[1]: made[NAMES[1]]},
    ],
)
def test_arrays_without_noise_or_unasked_are_found(
    spoil: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    found = faults(talk(replace(SENT, arrays=spoil(noisy()))))
    assert any("ArrayChunk.data has" in fault for fault in found)


def test_an_upload_that_is_not_in_the_ledger_is_found() -> None:
    found = faults(talk(replace(SENT, arrays=noisy())), noise=[])
    assert any("ArrayChunk.data has" in fault for fault in found)


def test_an_error_with_a_records_text_is_found() -> None:
    text = "ValueError: zyxquark is no class"
    assert faults(talk(Error(2, text))) == [f"device-01: Message.error.reason has {text}"]
    fixed = "The client could not do what was asked (error 0123abcd). Its own log says why."
    sound = f"<class 'fedlora_flwr.errors.ClientFailed'>:<'{fixed}'>"
    assert faults(talk(Error(2, sound))) == []
    assert faults(talk(Error(2, f"{sound} zyxquark"))) != []


def test_other_headers_calls_and_fields_are_found() -> None:
    said = talk(replace(SENT, arrays=noisy()), cookie="zyxquark")
    assert "device-01: header cookie is in no row: zyxquark" in faults(said)
    one = request("send-log", b"zyxquark")
    assert len(faults(Talk(bytearray(one)))) == 2
    hidden = fleet_pb2.PullMessagesRequest().SerializeToString() + b"\x9a\x3f\x08zyxquark"
    assert (
        "pull-messages.1011 is in no row"
        in faults(Talk(bytearray(request("pull-messages", hidden))))[0]
    )
    with pytest.raises(NotHTTP):
        list(halves(request("pull-messages", b"") + b"zyxquark"))


def test_a_word_is_found_in_the_usual_encodings() -> None:
    hidden = disguises("zyxquark")
    text = b"a zyxquark film"
    coded = [text, text.upper(), text.hex().encode(), text.decode().encode("utf-16-le")]
    coded += [base64.b64encode(b"." * before + text) for before in range(3)]
    assert all(any(one in each for one in hidden) for each in coded)
    assert not any(one in b"a film" for one in hidden)


def test_a_number_is_found_in_values_and_texts() -> None:
    yes: list[Any] = [1013, 1013.0, "n = 1013.", [1, 1013], ("x", "1013")]
    no: list[Any] = [1014, "11013", "0.1013", "a1013f", None, {}]
    assert all(tells(value, 1013) for value in yes)
    assert not any(tells(value, 1013) for value in no)


def test_the_page_has_both_tables() -> None:
    text = PAGE.read_text("utf-8")
    assert page(TABLE.items()) in text
    files = {name: Row(*row, lambda *_: True) for name, row in table_of_files().items()}
    assert page(files.items()) in text


def test_a_call_has_its_answer() -> None:
    said = talk(replace(SENT, arrays=noisy()))
    assert all(isinstance(call, Call) and call.answer for call in calls_of(said))
