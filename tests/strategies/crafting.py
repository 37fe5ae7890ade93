"""How to make a reply that no honest client sends from one that an honest client would send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.wire.records import train_records
from fedlora_flwr.wire.report import Report
from tests.strategies.tiny import arrays_of, record_of

Numbers = dict[str, NDArray[Any]]
Content = Callable[[RecordDict], None]
Fault = Callable[["Case"], list[Message]]
HUGE = 10_000_000


@dataclass
class Case:
    """One message to one of a few clients, and how an honest client answers it."""

    sent: Message
    number: int
    others: list[Message]

    @property
    def name(self) -> str:
        return f"partition-{self.number:06d}"

    def content(self) -> RecordDict:
        """Answer as the package's own client does."""
        config = self.sent.content.config_records["config"]
        start = arrays_of(self.sent.content.array_records["arrays"])
        layout = Layout.of(start)
        plan = ComponentPlan.parse(str(config["plan"]))
        share = str(config.get("share", ""))
        rng = np.random.default_rng((self.number, int(str(config["server-round"]))))
        arrays = {
            name: (start[name] + 0.1 * rng.normal(size=start[name].shape)).astype(np.float32)
            for name in layout.trained(plan, len(plan.steps))
            if share in ("", factor_of(name))
        }
        return train_records(
            Report(
                client=self.name,
                status="ok",
                arrays=arrays,
                epsilon=1.0,
                epsilon_budget=8.0,
                delta=1e-3,
                accountant="prv",
                steps=2 * int(str(config["server-round"])),
                seconds=0.5,
                peak_memory_mb=100.0,
                weight=10.0 + self.number,
                num_examples=10 + self.number,
            )
        )

    def honest(self) -> Message:
        return Message(self.content(), reply_to=self.sent)


def changed(change: Content) -> Fault:
    """Send an honest reply with a change."""

    def fault(case: Case) -> list[Message]:
        content = case.content()
        change(content)
        return [Message(content, reply_to=case.sent)]

    return fault


def arrays(change: Callable[[Numbers], None]) -> Fault:
    """Send other arrays."""

    def apply(content: RecordDict) -> None:
        values: Numbers = {n: a.numpy().copy() for n, a in content.array_records["arrays"].items()}
        change(values)
        content["arrays"] = record_of(values)

    return changed(apply)


def entry(value: float, dtype: Any = np.float32) -> Fault:
    """Put one value in one array, which may need another type."""

    def apply(values: Numbers) -> None:
        name = next(iter(values))
        values[name] = values[name].astype(dtype)
        values[name].flat[0] = value

    return arrays(apply)


def every(value: float, dtype: Any = np.float32) -> Fault:
    """Put one value in all entries of all arrays."""
    return arrays(lambda v: v.update({n: np.full(a.shape, value, dtype) for n, a in v.items()}))


def first(make: Callable[[NDArray[Any]], Any]) -> Fault:
    """Replace the first array."""

    def apply(values: Numbers) -> None:
        name = next(iter(values))
        values[name] = make(values[name])

    return arrays(apply)


def drop_first(values: Numbers) -> None:
    del values[next(iter(values))]


def rename_all(values: Numbers) -> None:
    for name in list(values):
        values[f"x.{name}"] = values.pop(name)


def raw(make: Callable[[Array], Array]) -> Fault:
    """Replace the first array by one that lies about itself."""

    def apply(content: RecordDict) -> None:
        record = dict(content.array_records["arrays"])
        name = next(iter(record))
        record[name] = make(record[name])
        content["arrays"] = ArrayRecord(record)

    return changed(apply)


def npy(header: str, data: bytes = b"\0" * 64, version: int = 1) -> Fault:
    """Send bytes whose header says something else."""
    text = header.encode().ljust(117 if version == 1 else 115) + b"\n"
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    content = b"\x93NUMPY" + bytes([version, 0]) + length + text + data
    return raw(lambda array: Array(array.dtype, array.shape, array.stype, content))


def metric(name: str, value: object) -> Fault:
    """Set a number, past the checks of Flower's own record, which a grid need not make."""
    return changed(lambda c: c.metric_records["metrics"].__dict__["_data"].update({name: value}))


def text(name: str, value: object) -> Fault:
    """Set a text, past the checks of Flower's own record."""
    return changed(lambda c: c.config_records["config"].__dict__["_data"].update({name: value}))


def without(record: str, name: str) -> Fault:
    """Leave a number or a text out."""
    return changed(lambda content: content[record].__delitem__(name))


def many(record: str, count: int, value: object) -> Fault:
    """Send many entries, past Flower's own checks, which take a second for them."""
    entries = {f"m{i}": value for i in range(count)}
    return changed(lambda content: content[record].__dict__["_data"].update(entries))


def deflated(values: NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.savez_compressed(stream, a=values)
    return stream.getvalue()


def raised(reason: str) -> Fault:
    return lambda case: [Message(Error(2, reason), reply_to=case.sent)]


def sent_by(node: int) -> Fault:
    """Answer well, under the id of a node that nobody asked."""

    def fault(case: Case) -> list[Message]:
        reply = case.honest()
        reply.metadata.__dict__["_src_node_id"] = node
        return [reply]

    return fault


def of_type(kind: str) -> Fault:
    def fault(case: Case) -> list[Message]:
        reply = case.honest()
        reply.metadata.__dict__["_message_type"] = kind
        return [reply]

    return fault


def named(name: object) -> Fault:
    return text("client", name)


def rename_first(content: RecordDict, name: str) -> None:
    record = dict(content.array_records["arrays"])
    record[name] = record.pop(next(iter(record)))
    content["arrays"] = ArrayRecord(record)


def second_record(content: RecordDict) -> None:
    content["more"] = content.array_records["arrays"]
