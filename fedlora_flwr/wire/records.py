"""Conversion of orders and reports to Flower's records and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue, OrderRefused
from fedlora_flwr.wire import ARRAYS, CLIENT, CONFIG, LOSS, METRICS, NAMES, limits
from fedlora_flwr.wire.arrays import from_numpy, record_of, to_numpy
from fedlora_flwr.wire.limits import NAME
from fedlora_flwr.wire.order import Order, named_arrays
from fedlora_flwr.wire.report import Report

T = TypeVar("T")


def train_records(report: Report) -> RecordDict:
    """Return the records that answer a train message: arrays, numbers and texts."""
    sent = {**report.arrays, **report.shares}
    arrays = {name: from_numpy(array) for name, array in sent.items()}
    return RecordDict({ARRAYS: record_of(arrays), **_scalars(report)})


def evaluate_records(report: Report) -> RecordDict:
    """Return the records that answer an evaluate message: numbers and texts."""
    return RecordDict(_scalars(report))  # type: ignore[arg-type,unused-ignore]


def query_records(report: Report) -> RecordDict:
    """Return the records that answer a query message: the client's name."""
    return RecordDict({CONFIG: ConfigRecord({CLIENT: report.client})})


def fit_content(
    arrays: Sequence[NDArray[Any]], sent: Iterable[str], metrics: Mapping[str, Any], examples: int
) -> RecordDict:
    """Return the records for the result of a NumPyClient's ``fit`` (see `Report.of_fit`).

    The values are not checked against limits, since the server may use a strategy of another
    package. Our server checks them in `read_training`.

    Raises
    ------
    InvalidValue
        The numbers of names and arrays differ, or a word has another type.
    """
    return train_records(Report.of_fit(arrays, sent, metrics, examples))


def evaluate_content(loss: float, metrics: Mapping[str, Any], examples: int) -> RecordDict:
    """Return the records for a NumPyClient's ``evaluate``, unchecked as in `fit_content`."""
    return evaluate_records(Report.of_scalars({**metrics, LOSS: loss}, examples))


def read_order(content: RecordDict) -> tuple[Order, dict[str, NDArray[np.float32]]]:
    """Read a train or evaluate message of a Message-API strategy.

    Returns
    -------
    tuple[Order, dict[str, ndarray]]
        The order, and the arrays in fp32 by name.

    Raises
    ------
    OrderRefused
        The message does not have exactly one ArrayRecord and one ConfigRecord, an array is damaged,
        or a value is not allowed (see `Order.from_config` and `named_arrays`).
    """
    record, config = message_records(content)
    if NAMES in config:
        raise OrderRefused(f"The message's configuration has {NAMES!r}; its arrays have names.")
    order = Order.from_config(config)
    try:
        values = [to_numpy(array) for array in record.values()]
    except Exception as error:  # NumPy's reader raises errors of many types.
        raise OrderRefused("An array of the message cannot be read: it is damaged.") from error
    return order, named_arrays(list(record), values)


def message_records(content: RecordDict) -> tuple[ArrayRecord, dict[str, Any]]:
    """Return the ArrayRecord and the ConfigRecord of a train or evaluate message.

    Raises
    ------
    OrderRefused
        A record is missing, or there are further records, which would be silently ignored.
    """
    arrays, configs = content.array_records, content.config_records
    for kind, records in (("ArrayRecord", arrays), ("ConfigRecord", configs)):
        if len(records) != 1:
            raise OrderRefused(f"The message has {len(records)} {kind}s. Send exactly one.")
    if count := len(content.metric_records):
        raise OrderRefused(f"The message has {count} MetricRecords, but clients read none.")
    return next(iter(arrays.values())), dict(next(iter(configs.values())))


def client_of(content: RecordDict) -> str:
    """Return the client's name in a reply; empty if the reply has none.

    Raises
    ------
    InvalidValue
        The value is not a valid name.
    """
    texts = _texts(content)
    return NAME.read(CLIENT, texts[CLIENT]) if CLIENT in texts else ""


def read_training(content: RecordDict) -> Report:
    """Read the answer to a train message.

    Raises
    ------
    InvalidValue
        There is not exactly one ArrayRecord, or a value is not allowed (see `Report.checked`).
    TypeError, ValueError
        An array cannot be read.
    """
    _check_records(content)
    if len(content.array_records) != 1:
        raise InvalidValue("ArrayRecords in a reply", len(content.array_records), "1")
    (record,) = content.array_records.values()
    if len(record) > limits.MOST_ARRAYS:
        raise InvalidValue("uploaded arrays", len(record), f"at most {limits.MOST_ARRAYS}")
    return _read(content, _arrays(record))


def read_figures(content: RecordDict) -> Report:
    """Read the answer to an evaluate message, or another answer without arrays.

    Raises
    ------
    InvalidValue
        A value is not allowed (see `Report.checked`).
    """
    _check_records(content)
    return _read(content, {})


def _read(content: RecordDict, arrays: Mapping[str, NDArray[Any]]) -> Report:
    return Report.of_words(arrays, _numbers(content), _texts(content)).checked()


def _scalars(report: Report) -> dict[str, MetricRecord | ConfigRecord]:
    """Return a report's numbers as a MetricRecord, and its texts and flags as a ConfigRecord."""
    numbers = MetricRecord(dict(report.numbers()))
    return {METRICS: numbers, CONFIG: ConfigRecord(dict(report.texts()))}


def _check_records(content: RecordDict) -> None:
    """Refuse a reply with more records than a report has."""
    for kind, records in (
        ("MetricRecords", content.metric_records),
        ("ConfigRecords", content.config_records),
    ):
        if len(records) > 1:
            raise InvalidValue(f"{kind} in a reply", len(records), "1")


def _arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    return {name: to_numpy(array) for name, array in record.items()}


def _numbers(content: RecordDict) -> Mapping[str, object]:
    return _only(content.metric_records, limits.MOST_NUMBERS)


def _texts(content: RecordDict) -> Mapping[str, object]:
    return _only(content.config_records, limits.MOST_NOTES)


def _only(records: Mapping[str, Mapping[str, Any]], further: int) -> Mapping[str, Any]:
    """Return the only record, or an empty one; refuse a record with too many entries."""
    record: Mapping[str, Any] = next(iter(records.values()), {})
    most = further + 32
    if len(record) > most:
        raise InvalidValue("entries of a record", len(record), f"at most {most}")
    return record
