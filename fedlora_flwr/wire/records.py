"""Orders and reports in Flower's records, and back."""

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
    """Write the answer to a message that trains: arrays, numbers and texts."""
    sent = {**report.arrays, **report.shares}
    arrays = {name: from_numpy(array) for name, array in sent.items()}
    return RecordDict({ARRAYS: record_of(arrays), **_scalars(report)})


def evaluate_records(report: Report) -> RecordDict:
    """Write the answer to a message that measures: numbers and texts."""
    return RecordDict(_scalars(report))  # type: ignore[arg-type,unused-ignore]


def query_records(report: Report) -> RecordDict:
    """Write the answer to a message that asks who the client is: texts."""
    return RecordDict({CONFIG: ConfigRecord({CLIENT: report.client})})


def fit_content(
    arrays: Sequence[NDArray[Any]], sent: Iterable[str], metrics: Mapping[str, Any], examples: int
) -> RecordDict:
    """Write what a NumPyClient's ``fit`` returned (see `Report.of_fit`).

    Nothing is held to limits here, since the server may be another strategy's; ours reads with
    `read_training`.

    Raises
    ------
    InvalidValue
        There are more or fewer names than arrays.
    """
    return train_records(Report.of_fit(arrays, sent, metrics, examples))


def evaluate_content(loss: float, metrics: Mapping[str, Any], examples: int) -> RecordDict:
    """Write what a NumPyClient's ``evaluate`` returned; limits as in `fit_content`."""
    return evaluate_records(Report.of_scalars({**metrics, LOSS: loss}, examples))


def read_order(content: RecordDict) -> tuple[Order, dict[str, NDArray[np.float32]]]:
    """Read what a Message-API strategy sent to train or to measure.

    Returns
    -------
    tuple[Order, dict[str, ndarray]]
        The order, and the arrays in fp32 by name.

    Raises
    ------
    OrderRefused
        There is not one ArrayRecord and one ConfigRecord, an array is damaged, or something is not
        allowed (see `Order.from_config` and `named_arrays`).
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
    """Return the two records that a message to train or to measure has.

    Raises
    ------
    OrderRefused
        There are others, or more: they would be ignored without a word.
    """
    arrays, configs = content.array_records, content.config_records
    for kind, records in (("ArrayRecord", arrays), ("ConfigRecord", configs)):
        if len(records) != 1:
            raise OrderRefused(f"The message has {len(records)} {kind}s. Send exactly one.")
    if count := len(content.metric_records):
        raise OrderRefused(f"The message has {count} MetricRecords, which nobody reads. Send none.")
    return next(iter(arrays.values())), dict(next(iter(configs.values())))


def client_of(content: RecordDict) -> str:
    """Return who a reply says it is from, or an empty text if it does not say.

    Raises
    ------
    InvalidValue
        That is not a name.
    """
    texts = _texts(content)
    return NAME.read(CLIENT, texts[CLIENT]) if CLIENT in texts else ""


def read_training(content: RecordDict) -> Report:
    """Read the answer to a message that trains.

    Raises
    ------
    InvalidValue
        There is not exactly one ArrayRecord, or something else is not allowed (see `Report`).
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
    """Read the answer to a message that measures, or one without arrays.

    Raises
    ------
    InvalidValue
        Something is not allowed (see `Report`).
    """
    _check_records(content)
    return _read(content, {})


def _read(content: RecordDict, arrays: Mapping[str, NDArray[Any]]) -> Report:
    return Report.of_words(arrays, _numbers(content), _texts(content)).checked()


def _scalars(report: Report) -> dict[str, MetricRecord | ConfigRecord]:
    """Numbers are metrics; Flower keeps texts and flags in a ConfigRecord."""
    numbers = MetricRecord(dict(report.numbers()))
    return {METRICS: numbers, CONFIG: ConfigRecord(dict(report.texts()))}


def _check_records(content: RecordDict) -> None:
    """Refuse more records than a report has."""
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
    """Return the one record, or an empty one, before anybody walks over a hundred thousand."""
    record: Mapping[str, Any] = next(iter(records.values()), {})
    most = further + 32
    if len(record) > most:
        raise InvalidValue("entries of a record", len(record), f"at most {most}")
    return record
