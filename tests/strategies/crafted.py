"""Replies that no honest client sends, by the name of the fault."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlora_flwr.layout import factor_of
from tests.strategies.crafting import (
    HUGE,
    Case,
    Fault,
    Numbers,
    arrays,
    changed,
    deflated,
    drop_first,
    entry,
    every,
    first,
    many,
    metric,
    named,
    npy,
    of_type,
    raised,
    raw,
    rename_all,
    rename_first,
    second_record,
    sent_by,
    text,
    without,
)

SPOOF = "ok\n\x1b[2J\x1b[31m> round 1: partition-000000: NaN\r\u202e"

REFUSED: Mapping[str, Fault] = {
    # Values of arrays.
    "nan": entry(math.nan),
    "inf": entry(math.inf),
    "minus inf": entry(-math.inf),
    "1e20 in one entry": entry(1e20),
    "1e20 in all": every(1e20),
    "1e30 in all": every(1e30),
    "1e38 in all": every(3e38),
    "just above the limit": every(20_001.0),
    "far below the limit": every(-1e12),
    "fp64 beyond fp32": entry(1e300, np.float64),
    "largest fp16": every(65504.0, np.float16),
    # Types and shapes.
    "int64": first(lambda a: a.astype(np.int64)),
    "bool": first(lambda a: a > 0),
    "complex": first(lambda a: a.astype(np.complex64)),
    "text array": first(lambda a: np.full(a.shape, "x")),
    "longdouble": first(lambda a: a.astype(np.longdouble)),
    "datetime": first(lambda a: np.zeros(a.shape, "<M8[s]")),
    "structured": first(lambda a: np.zeros(a.shape, [("a", "<f4")])),
    "0-d": first(lambda a: np.float32(1).reshape(())),
    "empty": first(lambda a: a[:0]),
    "transposed": first(lambda a: np.ascontiguousarray(a.T)),
    "one dimension more": first(lambda a: a[None]),
    "rank too high": first(lambda a: np.vstack([a, a])),
    "thirty dimensions": first(lambda a: a.reshape((1,) * 30 + a.shape)),
    "no arrays": arrays(lambda values: values.clear()),
    "an array less": arrays(drop_first),
    "an array more": arrays(lambda v: v.update({"backdoor.weight": np.ones(3, np.float32)})),
    "all arrays renamed": arrays(rename_all),
    "a folded pair": arrays(
        lambda v: v.update({"blocks.0.fc.folded_B.weight": np.ones((4, 1), np.float32)})
    ),
    "name with escapes": changed(lambda content: rename_first(content, SPOOF)),
    "name of a megabyte": changed(lambda content: rename_first(content, "x" * 1_000_000)),
    "empty array name": changed(lambda content: rename_first(content, "")),
    # Bytes that are no array, or another one than they say.
    "no bytes": raw(lambda a: Array(a.dtype, a.shape, a.stype, b"")),
    "junk": raw(lambda a: Array(a.dtype, a.shape, a.stype, b"\x93NUMPY\x01\x00junk")),
    "other serialization": raw(lambda a: Array(a.dtype, a.shape, "torch", a.data)),
    "cut": raw(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-4])),
    "pickle": raw(lambda a: Array(a.dtype, a.shape, a.stype, b"\x80\x04N.")),
    "archive": raw(lambda a: Array(a.dtype, a.shape, a.stype, deflated(np.ones(3)))),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }"),
    "a terabyte": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 250000), }"),
    "a terabyte in columns": npy(
        "{'descr': '<f4', 'fortran_order': True, 'shape': (1000000, 250000), }"
    ),
    "overflowing shape": npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }"
    ),
    "negative shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    "no header": npy("__import__('os').abort()"),
    "nested type": npy("{'descr': ('<f4', (99999999,)), 'fortran_order': False, 'shape': (9,), }"),
    "version 2": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9), }", version=2),
    # Numbers.
    "epsilon nan": metric("epsilon", math.nan),
    "epsilon negative": metric("epsilon", -1.0),
    "epsilon 1e300": metric("epsilon", 1e300),
    "epsilon above its budget": metric("epsilon", 9.0),
    "epsilon as a list": metric("epsilon", [1.0]),
    "delta above 1": metric("delta", 2.0),
    "steps negative": metric("steps", -1),
    "steps of no round": metric("steps", 0),
    "steps of half a round": metric("steps", 1),
    "steps a fraction": metric("steps", 2.5),
    "steps beyond int64": metric("steps", 2**70),
    "seconds nan": metric("seconds", math.nan),
    "weight zero": metric("weight", 0.0),
    "weight negative": metric("weight", -5.0),
    "weight 1e30": metric("weight", 1e30),
    "weight inf": metric("weight", math.inf),
    "weight a flag": metric("weight", True),
    "weight missing or a text": metric("weight", "10"),
    "examples negative": metric("num-examples", -1),
    "examples beyond int64": metric("num-examples", 2**80),
    "examples a list": metric("num-examples", [1, 2]),
    "metric beyond float": metric("loss", 10**400),
    "metric of 5000 digits": metric("loss", 10**5000),
    "metric nan": metric("loss", math.nan),
    "metric none": metric("loss", None),
    "metric bytes": metric("loss", b"\0" * 100),
    "metric record": metric("loss", {"a": 1}),
    "unprotected inf": metric("unprotected-loss", math.inf),
    "metric name with escapes": metric(SPOOF, 1.0),
    "metric name of 10 MB": metric("m" * HUGE, 1.0),
    "a hundred metrics": many("metrics", 100, 1.0),
    "1e5 metrics": many("metrics", 100_000, 1.0),
    # Scores.
    "list nan": metric("scores", [math.nan, 1.0]),
    "list huge": metric("scores", [1e30, 1.0]),
    "list of 1e5": metric("scores", [1.0] * 100_000),
    "list of texts": metric("scores", ["a", "b"]),
    "list empty": metric("scores", []),
    # Texts.
    "note of 10 MB": text("note", "x" * HUGE),
    "note with escapes": text("note", SPOOF),
    "note bytes of 10 MB": text("note", b"x" * HUGE),
    "note a list": text("note", [1, 2]),
    "status unknown": text("status", "fine"),
    "status a number": text("status", 1),
    "accountant of 10 MB": text("accountant", "x" * HUGE),
    "epsilon as a text": text("epsilon", "1.0"),
    "1e5 texts": many("config", 100_000, "x"),
    # Records.
    "no arrays record": changed(lambda content: content.__delitem__("arrays")),
    "two array records": changed(second_record),
    "two metric records": changed(lambda c: c.__setitem__("m", MetricRecord({"a": 1.0}))),
    "two texts records": changed(lambda c: c.__setitem__("t", ConfigRecord({"a": "b"}))),
    "nothing": changed(lambda content: content.clear()),
    # Who it is.
    "another's name": named("partition-000000"),
    "empty name": named(""),
    "blank name": named("   "),
    "name with escapes of its own": named(SPOOF),
    "name of 10 MB": named("x" * HUGE),
    "a node's name": named("node 00000000000000000017"),
    "name a number": named(7),
    "a name among the numbers": metric("client", 7.0),
    # Messages.
    "raised": raised("RuntimeError: disk full"),
    "raised with 10 MB": raised("<class 'a'>:<'" * 700_000),
    "raised with escapes": raised(SPOOF),
    "raised nothing": raised(""),
    "not asked": sent_by(12345),
    "wrong type": of_type("evaluate"),
    "silent": lambda case: [],
}


def keep(factor: str | None) -> Fault:
    """Upload one factor only."""

    def apply(values: Numbers) -> None:
        for name in [name for name in values if factor_of(name) != factor]:
            del values[name]

    return arrays(apply)


def ranks(*found: int) -> Fault:
    """Upload factors of these ranks, in turn, where the global rank is 2."""

    def apply(values: Numbers) -> None:
        for i, name in enumerate(sorted(values)):
            rank, factor = found[i // 2 % len(found)], factor_of(name)
            if factor:
                values[name] = values[name][:rank] if factor == "A" else values[name][:, :rank]

    return arrays(apply)


def kept_too(case: Case) -> list[Message]:
    """Send what stays with the client."""
    content = case.content()
    record = dict(content.array_records["arrays"])
    record["blocks.0.fc.lora_B.weight"] = Array(np.ones((4, 2), np.float32))
    content["arrays"] = ArrayRecord(record)
    return [Message(content, reply_to=case.sent)]


# What one method alone refuses.
OWN: Mapping[str, Mapping[str, Fault]] = {
    "la-lora": {"B only": keep("B"), "A only": keep("A"), "head only": keep(None)},
    "flexlora": {"ranks that differ": ranks(1, 2), "rank 0": ranks(0)},
    "fedsa-lora": {"what stays": kept_too},
}


def _other_kind(case: Case) -> list[Message]:
    return [case.honest(), case.honest()]


HARMLESS: Mapping[str, Fault] = {
    "honest": lambda case: [case.honest()],
    "twice": _other_kind,
    "minus zero": every(-0.0),
    "denormal": every(1e-42),
    "at the limit": every(20_000.0),
    "at the limit in turn": arrays(
        lambda v: v.update(
            {n: np.where(np.arange(a.size).reshape(a.shape) % 2, -2e4, 2e4) for n, a in v.items()}
        )
    ),
    "rank one at the limit": arrays(
        lambda v: v.update({n: np.where(a > 0, 2e4, 0.0) for n, a in v.items()})
    ),
    "columns first": first(np.asfortranarray),
    "big endian": first(lambda a: a.astype(">f4")),
    "fp16": first(lambda a: a.astype(np.float16)),
    "largest weight": metric("weight", 1e9),
    "smallest weight": metric("weight", 1e-300),
    "most examples": metric("num-examples", 10**9),
    "no examples": metric("num-examples", 0),
    "a jump of steps": metric("steps", 10**9),
    "epsilon without a bound": changed(
        lambda c: c.metric_records["metrics"].update(
            {"epsilon": math.inf, "epsilon-budget": math.inf}
        )
    ),
    "no epsilon": without("metrics", "epsilon"),
    "no name": without("config", "client"),
    "further numbers": metric("round", 77.0),
    "further texts": text("plan", "B"),
    "a flag": text("round", True),
    "declines": text("status", "budget-exhausted"),
}
