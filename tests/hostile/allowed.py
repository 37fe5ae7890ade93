"""All that a reply may hold, written down apart from the package's own types.

Nothing here calls the package: a fault in its parsers must not hide in its tests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict

FAILED = re.compile(
    r"<class 'fedlora_flwr\.errors\.ClientFailed'>:<'The client could not do what was asked "
    r"\(error [0-9a-f]{8}\)\. Its own log says why\.'>"
)
EXHAUSTED = (
    "<class 'fedlora_flwr.errors.BudgetExhausted'>:<'budget exhausted: this client takes no "
    "further part'>"
)
REFUSED = "<class 'fedlora_flwr.errors.OrderRefused'>:<'"
MOST_ENTRY = 20_000
_LONGEST_REFUSAL = 4000
_ACCOUNT = {"epsilon", "epsilon-budget", "delta", "steps", "seconds", "peak-memory-mb", "weight"}
_NUMBERS = _ACCOUNT | {"num-examples"}
_TEXTS = {"status", "accountant", "client"}
_ACCOUNTANT = re.compile(r"[a-z][a-z0-9-]{1,30}")


@dataclass(frozen=True)
class Public:
    """What a server may know of a device."""

    client: str
    epsilon: float
    delta: float
    shapes: Mapping[str, tuple[int, ...]]
    """The model's arrays. -1 stands for the rank."""
    blocks: int
    figures: frozenset[str] = frozenset()
    """Figures of evaluations, where the device's file names a split for them."""
    weighting: str = "uniform"
    """What the device's file lets a reply tell as its weight."""


def check_error(reason: str, private: Collection[str]) -> str:
    """Return what kind of error it is: "refused", "failed" or "exhausted"."""
    if reason == EXHAUSTED:
        return "exhausted"
    if FAILED.fullmatch(reason):
        return "failed"
    assert reason.startswith(REFUSED), f"this text may not travel: {reason!r}"
    assert len(reason) <= _LONGEST_REFUSAL, f"a refusal of {len(reason)} characters"
    check_private(reason, private)
    return "refused"


def check_private(text: str, private: Collection[str]) -> None:
    lowered = text.lower()
    for secret in private:
        assert secret.lower() not in lowered, f"{secret!r} is in {text[:500]!r}"


def check_query(content: RecordDict, device: Public) -> None:
    _check_names(content, arrays=set(), metrics=set(), configs={"config"})
    assert dict(content.config_records["config"]) == {"client": device.client}


def check_training(content: RecordDict, device: Public) -> str:
    """Check a Message-API reply and return its status."""
    _check_names(content, arrays={"arrays"}, metrics={"metrics"}, configs={"config"})
    texts = dict(content.config_records["config"])
    assert set(texts) == _TEXTS
    assert texts["client"] == device.client
    numbers = dict(content.metric_records["metrics"])
    assert set(numbers) == _NUMBERS
    arrays = _values(content.array_records["arrays"])
    _check_account(numbers, texts, arrays, device)
    _check_weight(numbers["weight"], numbers["num-examples"], str(texts["status"]), device)
    return str(texts["status"])


def check_legacy_training(content: RecordDict, device: Public) -> str:
    """Check a reply in Flower's legacy records and return its status."""
    _check_names(
        content,
        arrays={"fitres.parameters"},
        metrics={"fitres.num_examples"},
        configs={"fitres.metrics", "fitres.status"},
    )
    _check_status(content, "fitres.status")
    found = dict(content.config_records["fitres.metrics"])
    names = str(found.pop("array-names"))
    texts = {key: found.pop(key) for key in ("status", "accountant")}
    assert set(found) == _ACCOUNT
    values = _values(content.array_records["fitres.parameters"], named=False)
    listed = names.split(",") if names else []
    assert len(listed) == len(values)
    arrays = dict(zip(listed, values.values(), strict=True))
    _check_account(found, texts, arrays, device)
    examples = dict(content.metric_records["fitres.num_examples"])
    assert set(examples) == {"num_examples"}
    _check_weight(found["weight"], examples["num_examples"], str(texts["status"]), device)
    return str(texts["status"])


def check_figures(content: RecordDict, device: Public) -> None:
    assert device.figures, "a device that names no split was evaluated"
    _check_names(content, arrays=set(), metrics={"metrics"}, configs={"config"})
    assert dict(content.config_records["config"]) == {"client": device.client}
    numbers = dict(content.metric_records["metrics"])
    assert set(numbers) == device.figures | {"num-examples"}
    assert numbers["num-examples"] == 1
    assert all(type(value) in (int, float) for value in numbers.values())


def check_legacy_figures(content: RecordDict, device: Public) -> None:
    assert device.figures, "a device that names no split was evaluated"
    _check_names(
        content,
        arrays=set(),
        metrics={"evaluateres.loss", "evaluateres.num_examples"},
        configs={"evaluateres.metrics", "evaluateres.status"},
    )
    _check_status(content, "evaluateres.status")
    assert set(content.metric_records["evaluateres.loss"]) == {"loss"}
    assert dict(content.metric_records["evaluateres.num_examples"]) == {"num_examples": 1}
    assert set(content.config_records["evaluateres.metrics"]) == device.figures


def check_start(content: RecordDict, device: Public) -> None:
    """Check the answer to a legacy request for parameters: a start that follows from the seed."""
    _check_names(
        content,
        arrays={"getparametersres.parameters"},
        metrics=set(),
        configs={"getparametersres.status"},
    )
    _check_status(content, "getparametersres.status")
    values = _values(content.array_records["getparametersres.parameters"], named=False)
    _check_arrays(dict(zip(device.shapes, values.values(), strict=True)), device)


def check_properties(content: RecordDict) -> None:
    _check_names(
        content,
        arrays=set(),
        metrics=set(),
        configs={"getpropertiesres.properties", "getpropertiesres.status"},
    )
    assert dict(content.config_records["getpropertiesres.properties"]) == {}


def _check_names(
    content: RecordDict, *, arrays: set[str], metrics: set[str], configs: set[str]
) -> None:
    assert set(content.array_records) == arrays
    assert set(content.metric_records) == metrics
    assert set(content.config_records) == configs
    assert set(content) == arrays | metrics | configs


def _check_status(content: RecordDict, name: str) -> None:
    assert dict(content.config_records[name]) == {"code": 0, "message": "Success"}


def _check_account(
    numbers: Mapping[str, Any],
    texts: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    device: Public,
) -> None:
    assert texts["status"] in ("ok", "budget-exhausted")
    assert _ACCOUNTANT.fullmatch(str(texts["accountant"]))
    for key in _ACCOUNT - {"steps"}:
        assert type(numbers[key]) is float, key
    assert type(numbers["steps"]) is int
    assert 0 <= numbers["steps"] <= 10**10
    assert 0 <= numbers["epsilon"] <= device.epsilon or numbers["steps"] == 0
    assert numbers["epsilon-budget"] == device.epsilon
    assert numbers["delta"] == device.delta
    assert 0 <= numbers["seconds"] < 600
    assert 1 < numbers["peak-memory-mb"] < 1e6
    # A plan may train nothing of what is exchanged: then there are none.
    assert texts["status"] == "ok" or not arrays
    _check_arrays(arrays, device)


def _check_weight(weight: Any, examples: Any, status: str, device: Public) -> None:
    told = (weight, examples)
    if status != "ok":
        assert told == (1.0, 0)
    elif told != (1.0, 1):
        size = device.weighting == "size" and weight == examples > 0
        noise = device.weighting == "inverse-noise" and weight > 0 and examples == 1
        assert size or noise, f"a weight that the device does not tell: {told}"


def _check_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], device: Public) -> None:
    for name, values in arrays.items():
        assert name in device.shapes, name
        assert values.dtype == np.float32, name
        shape = device.shapes[name]
        assert len(values.shape) == len(shape), name
        assert all(a == b or b == -1 for a, b in zip(values.shape, shape, strict=True)), name
        # NaN is at most nothing.
        assert (np.abs(values) <= MOST_ENTRY).all(), name


def _values(record: ArrayRecord, named: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays from their bytes, as whoever gets them does."""
    found = {}
    for name, array in record.items():
        if name == "_empty" and not array.data:
            continue
        stream = BytesIO(array.data)
        values = np.load(stream, allow_pickle=False)
        assert not stream.read(), "bytes beyond the array"
        assert array.stype == "numpy.ndarray"
        if named:
            assert array.dtype == str(values.dtype)
            assert tuple(array.shape) == values.shape
        found[name] = values
    return found
