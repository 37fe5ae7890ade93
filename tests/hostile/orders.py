"""What a hostile server sends: values at the limits of every key and outside, and broken arrays."""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array
from hypothesis import Phase, settings
from hypothesis import strategies as st

from fedlora_flwr.config.keys import allowed_values, fields_by_key
from fedlora_flwr.config.names import full_name
from fedlora_flwr.config.run_config import RunConfig
from tests.hostile.device import RUN, start


def examples(count: int) -> settings:
    """Return settings for the same messages at each run. What fails is shown as it was sent."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
    )


LAST = 2**63 - 1  # Flower sends whole numbers in 64 bits.
NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 2**31, 2**53, LAST, -LAST - 1, 0.0, -0.0, 0.5, 1.0, -1.0, 5e-324, 1.4e-45,
    1e-38, 1e-6, 1e-3, 1e6, 1e15, 1e38, 3.5e38, 1e300, sys.float_info.max, math.inf, -math.inf,
    math.nan,
]  # fmt: skip
TEXTS = [
    "", " ", "0", "1", "nan", "inf", "none", "true", "train", "test", "validation", "label", "*",
    "../..", "..", "/", "/etc/passwd", "~", "$HOME", "file:///etc/passwd", "http://127.0.0.1:9/x",
    "bait_task:make", "os:system", "tests.hostile.tiny_task:make", "digits", "text-classification",
    "\x00", "a\nb", "\u202e", "é", "{{ 1 }}", "%s%n", "'; DROP TABLE releases; --", "x" * 10_000,
    "x" * 10_001, "x" * 1_000_000, "A", "B", "uniform", "size", "inverse-noise", "lifetime", "run",
    "secant", "random", "pretrained", "4bit", "8bit", "inductor", "bf16", "cuda", "meta", "cpu",
    "natural-id", "iid", "1,2,4", "adamw", "sgd", "doppler", "flexlora", "fedsa-lora",
]  # fmt: skip
PATTERNS = [
    ".*", "(", "[", "(a+)+$", "(.*)*x", "(a|a)*b", "(?=a)b", r"(a)\1", "a{99999999999}", "(?i)x",
    ".?" * 150 + "!", ".{0,500}" * 40 + "!", "(|a)" * 100 + "!", "(" * 400, "(?P<n>.)(?(n)a|b)",
    r"blocks\.\d+\.fc", r"blocks\.0\.fc", "head", "blocks", r".*\.(fc|head)", "(?:.*)(?:.*)(?:.*)!",
]  # fmt: skip
_OTHERS: list[Any] = [True, False, b"", b"\x80", [], [1], ["a"], [1.5], [b"a"], [True]]

scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(_OTHERS),
    st.integers(-LAST - 1, LAST), st.floats(), st.text(max_size=40), st.binary(max_size=20),
)  # fmt: skip
"""Anything that a record of Flower's can hold."""
run_scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from([*TEXTS, *PATTERNS]), st.booleans(),
    st.integers(-LAST - 1, LAST), st.floats(), st.text(max_size=40),
)  # fmt: skip
"""Anything that a run's configuration can hold."""


def at_the_limits(bait: Path) -> Iterator[tuple[str, Any]]:
    """Yield each key with the ends of what its own words allow, values beside, and other types.

    Parameters
    ----------
    bait : Path
        A folder outside the device's, which texts name.
    """
    for key, entry in fields_by_key(RunConfig).items():
        words = allowed_values(entry)
        kind = type(entry.default)
        values: list[Any] = [True, False] if kind is bool else []
        for text in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", words):
            limit = float(text.replace(",", ""))
            values += [limit, -limit, math.nextafter(limit, -math.inf), limit * 2]
            values += [math.nextafter(limit, math.inf)]
            if limit == int(limit):
                values += [int(limit), int(limit) - 1, int(limit) + 1]
        values += re.findall(r"'([^']*)'", words)
        if kind is str:
            values += [*TEXTS, *PATTERNS, str(bait), str(bait / "model"), str(bait / "train.jsonl")]
        values += NUMBERS[:: 4 if kind is str else 1]
        values += ["", "1", True, entry.default]
        seen = set()
        for value in values:
            if isinstance(value, int) and not -LAST - 1 <= value <= LAST:
                continue
            if (mark := (type(value), repr(value))) not in seen:
                seen.add(mark)
                yield key, value


def run_configs(bait: Path) -> st.SearchStrategy[dict[str, Any]]:
    """Return run configurations: the shipped one with up to six keys changed, and other keys."""
    paths = st.sampled_from([str(bait), f"{bait}/model", "../../outside/bait", "../.."])
    # In short, in full as Flower sends them, and what is no key.
    short, full = st.sampled_from([*RUN]), st.sampled_from([*map(full_name, RUN)])
    keys = st.one_of(short, short, full, full, st.text(max_size=20))
    changes = st.dictionaries(keys, st.one_of(run_scalars, paths), max_size=6)
    left_out = st.sets(st.sampled_from([*RUN]), max_size=3)

    def sent(changed: dict[str, Any], out: set[str]) -> dict[str, Any]:
        kept = {k: v for k, v in RUN.items() if k not in out and full_name(k) not in changed}
        return {**kept, **changed}

    return st.builds(sent, changes, left_out)


PLANS = [
    "", "A", "B", "*", "AB", "BA", "**", "A/B", "AB/BA", "ABA", "*/", "/", "//", "a", "X", "A/B/AB",
    "A" * 3, "B" * 1000, "*/" * 20_000 + "*", "A" * 100_001, "A\n", " A", "\u0391", "A,B", "lora_A",
]  # fmt: skip
ORDER_KEYS: dict[str, list[Any]] = {
    "server-round": [0, 1, 2, 3, 1_000_000, 1_000_001, -1, LAST, True, 1.0, "1"],
    "plan": PLANS,
    "array-names": ["", ",", "head.weight", ",".join(start(4)), "a,b", "x" * 10_000_001],
    "weighting": ["uniform", "size", "inverse-noise", "", "Uniform"],
    "fingerprint": ["", "0" * 32, "0" * 129, "../..", "x"],
    "share": ["", "A", "B", "*", "a"],
}
_FURTHER = [
    "loss", "epsilon", "num-examples", "state-dir", "dataset", "task", "lr", "server_round",
    "clipping_norm", "norm_bit", "test-split", "report-unprotected-metrics", "", "__class__",
]  # fmt: skip


def order_configs() -> st.SearchStrategy[dict[str, Any]]:
    """Return configurations of messages: known keys with values good and bad, and other keys."""
    known = st.fixed_dictionaries(
        {},
        optional={
            key: st.one_of(st.sampled_from(values), st.sampled_from(values), scalars)
            for key, values in ORDER_KEYS.items()
        },
    )
    further = st.dictionaries(
        st.one_of(st.sampled_from(_FURTHER), st.text(max_size=20)), scalars, max_size=2
    )
    return st.builds(lambda a, b: {**b, **a}, known, st.one_of(st.just({}), st.just({}), further))


class Touch:
    """Unpickles to a call that makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._mark), "w")


def _npy(header: bytes, body: bytes = b"\0" * 64, version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + body


@functools.cache
def damaged_bytes(mark: Path) -> list[bytes]:
    """Return bytes that are no sound array: cut, lying, or code.

    Parameters
    ----------
    mark : Path
        File that appears if one of them is unpickled.
    """
    stream = io.BytesIO()
    np.save(stream, np.ones((4, 8), "f4"))
    whole = stream.getvalue()
    objects = io.BytesIO()
    np.save(objects, np.array([Touch(mark)], object), allow_pickle=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("arr_0.npy", whole)
    shapes = [
        "(4, 9)", "(-1,)", "(-4, -8)", "(8589934592, 8589934592)", "(9223372036854775807,)",
        "(1000000000000,)", "(0,)", "()", "4", "(4.0, 8)", "(True, 8)", "((4,), 8)", "None",
        "(99999999999999999999999, 1)",
    ]  # fmt: skip
    types = ["'<f4'", "'|O'", "'>f4'", "'<f2'", "'|V4'", "'<U1'", "[('a', '<f4')]", "'f4,f4'", "1"]
    lies = [f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}" for shape in shapes]
    lies += [f"{{'descr': {kind}, 'fortran_order': True, 'shape': (4, 8), }}" for kind in types]
    lies += [
        "", "{", "[]", "{}", "(" * 5000, "__import__('os').getcwd()", "{'descr': '<f4'}",
        "x" * 60_000,
    ]  # fmt: skip
    return [
        b"", b"\0", b"\x93NUMPY", whole[:-1], whole[:20], whole[: len(whole) // 2], whole + b"more",
        pickle.dumps(Touch(mark)), pickle.dumps(np.ones(3)), objects.getvalue(), packed.getvalue(),
        whole.replace(b"\x01\x00", b"\x09\x00", 1), b"PK\x03\x04", b"\x80\x05.",
        *(_npy(lie.encode() + b"\n") for lie in lies),
        *(_npy(lie.encode() + b"\n", version=b"\x02\x00") for lie in lies[:4]),
        *(_npy(lie.encode() + b"\n", version=b"\x03\x00") for lie in lies[:4]),
    ]  # fmt: skip


_VALUES = [
    math.nan, math.inf, -math.inf, 1e15, -1e15, 1e38, -3e38, 10_000.01, 1e20, 1e5, -10_001.0,
]  # fmt: skip
_DTYPES = ["i4", "i8", "u1", "?", "c8", "c16", "S4", "U4", "M8[s]", "m8[s]", "V8"]


# Built once: a strategy made while drawing costs more than its values.
_NAMES = st.sampled_from([*start(4)])
_KINDS = st.sampled_from(["value", "dtype", "shape", "bytes", "name", "lie"])
_FORMS = st.sampled_from(["f4", ">f4", "f2", "f8", "g", "fortran", "tiny", "largest"])


@st.composite
def hostile_arrays(draw: st.DrawFn, mark: Path) -> dict[str, Any]:
    """Return arrays of which at least one cannot be what the model has."""
    arrays: dict[str, Any] = dict(start(4))
    for _ in range(draw(st.integers(1, 3))):
        name, kind = draw(_NAMES), draw(_KINDS)
        if name not in arrays or not isinstance(arrays[name], np.ndarray):
            continue
        arrays = _MUTATIONS[kind](draw, arrays, name, mark)
    return arrays


def _change_value(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    values = np.array(arrays[name])
    if values.dtype.kind != "f" or not values.size:
        return arrays
    values.flat[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from(_VALUES))
    return {**arrays, name: values}


def _change_dtype(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    return {**arrays, name: np.zeros(arrays[name].shape, draw(st.sampled_from(_DTYPES)))}


def _change_shape(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    shape = arrays[name].shape
    others = st.one_of(
        st.sampled_from([(), (0,), (1,), (*shape, 1), (1, *shape), shape[1:], (5, 8), (8, 5)]),
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
    )
    return {**arrays, name: np.zeros(draw(others.filter(lambda s: s != shape)), "f4")}


def _change_bytes(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    data = draw(st.one_of(st.sampled_from(damaged_bytes(mark)), st.binary(max_size=200)))
    return {**arrays, name: Array("float32", tuple(arrays[name].shape), "numpy.ndarray", data)}


def _change_name(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    layer = name.rsplit(".lora_", 1)[0]
    names = st.sampled_from(
        ["", ",", f"{name},", f"{name},head.bias", f"{name} ", name.upper(), "../..", "x" * 5000,
         f"{layer}.folded_B.weight", f"{layer}.folded_A.weight", f"{layer}.lora_C.weight",
         f"base_model.model.{name}", "blocks.9.fc.lora_A.weight", "\x00", "_empty"]
    )  # fmt: skip
    found = {key: value for key, value in arrays.items() if key != name}
    if draw(st.booleans()):
        found[draw(st.one_of(names, st.text(max_size=30)))] = arrays[name]
    return found


def _lie(draw: st.DrawFn, arrays: dict[str, Any], name: str, mark: Path) -> dict[str, Any]:
    """Let the words beside an array's bytes say something else, and its serialization too."""
    data = Array(np.full(arrays[name].shape, math.nan, "f4")).data
    kind = draw(st.sampled_from(["float32", "object", "", "int64"]))
    shape = draw(st.sampled_from([(), (0,), (4, 8), (2**40, 2**40)]))
    words = draw(st.sampled_from(["numpy.ndarray", "pickle", "", "torch", "numpy.ndarray\0"]))
    return {**arrays, name: Array(kind, shape, words, data)}


_MUTATIONS = {
    "value": _change_value, "dtype": _change_dtype, "shape": _change_shape,
    "bytes": _change_bytes, "name": _change_name, "lie": _lie,
}  # fmt: skip


@st.composite
def sound_arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Return the model's arrays in forms that a device can read: types, order, tiny values."""
    arrays: dict[str, Any] = {}
    for name, values in start(4, seed=draw(st.integers(0, 3))).items():
        form = draw(_FORMS)
        if form == "fortran":
            arrays[name] = np.asfortranarray(values)
        elif form == "tiny":
            arrays[name] = np.full_like(values, 1e-45)
        elif form == "largest":
            arrays[name] = np.sign(values) * np.float32(1e4)
        else:
            arrays[name] = values.astype(form)
    order = draw(st.permutations(list(arrays)))
    return {name: arrays[name] for name in order}
