"""What a NumPyClient's methods return, as the records that Message-API strategies read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.arrays import from_numpy, record_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import NAMES, SCORES


def fit_content(
    arrays: Sequence[NDArray[Any]], sent: Iterable[str], metrics: Mapping[str, Any], examples: int
) -> RecordDict:
    """Give uploaded arrays the names that the client gave them, or else those it was sent.

    Parameters
    ----------
    arrays, metrics, examples
        What ``fit`` returned. The names are among the metrics, with commas between them.
    sent : Iterable[str]
        Names of the arrays that the client was sent.

    Raises
    ------
    InvalidValue
        There are more or fewer names than arrays.
    """
    given = dict(metrics)
    names = [name for name in str(given.pop(NAMES, ",".join(sent))).split(",") if name]
    if len(names) != len(arrays):
        raise InvalidValue("uploaded arrays", len(arrays), f"one for each of {len(names)} names")
    uploaded = record_of({n: from_numpy(array) for n, array in zip(names, arrays, strict=True)})
    return RecordDict({"arrays": uploaded, **_split(given, examples)})


def evaluate_content(loss: float, metrics: Mapping[str, Any], examples: int) -> RecordDict:
    """Put what ``evaluate`` returned in records."""
    return RecordDict(_split({**metrics, "loss": loss}, examples))  # type: ignore[arg-type,unused-ignore]


def _split(metrics: Mapping[str, Any], num_examples: int) -> dict[str, MetricRecord | ConfigRecord]:
    """Numbers are metrics; Flower keeps texts and flags in a ConfigRecord.

    A NumPyClient's metrics cannot be lists, so scores come as bytes, and leave as numbers.
    """
    rest = dict(metrics)
    scores = rest.pop(SCORES, None)
    lists = {SCORES: np.frombuffer(scores, "<f8").tolist()} if isinstance(scores, bytes) else {}
    numbers = {
        k: v for k, v in rest.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    others = {k: v for k, v in rest.items() if k not in numbers}
    return {
        "metrics": MetricRecord({**numbers, **lists, "num-examples": num_examples}),
        "config": ConfigRecord(others),
    }
