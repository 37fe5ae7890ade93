"""What clients answer, and what a round came to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedlora_flwr.aggregation import Arrays
from fedlora_flwr.arrays import from_numpy, record_of, to_numpy, travel_size
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.plan import factor_of
from fedlora_flwr.wire import SCORES

_NUMBER_BYTES = 8


@dataclass(frozen=True)
class Upload:
    """One client's accepted answer.

    Parameters
    ----------
    client : str
        Who sent it; uploads are averaged in the order of this name.
    arrays : Arrays
        What trained.
    weight : float
        Aggregation weight.
    metrics : dict[str, float]
        The numbers that came along.
    texts : dict[str, str]
        The texts that came along.
    scores : tuple[float, ...]
        One a block, where the strategy asked for them.
    """

    client: str
    arrays: Arrays
    weight: float
    metrics: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)
    scores: tuple[float, ...] = ()


@dataclass
class RoundReport:
    """What happened in one round.

    Parameters
    ----------
    server_round : int
        Round, from 1.
    plan : str
        The plan's wire string.
    sent : int
        Messages sent.
    bytes_down, bytes_up : int
        Bytes of array data and scores in the messages sent and in the replies.
    bytes_up_adapters : int
        Those among ``bytes_up`` that are LoRA factors.
    bytes_plain : int
        Bytes of plain averaging: all factors and the head in each training message and each reply.
    uploads : list[Upload]
        Accepted answers.
    declined : list[str]
        Clients whose budget is spent.
    failures : list[str]
        Why the other answers could not be used, one line each.
    details : dict[str, Any]
        What else the strategy has to tell of the round; it goes to the round's row.
    evaluation : dict[str, float]
        Metrics that clients measured on public records, where the server has no model to measure.
    """

    server_round: int
    plan: str
    sent: int
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_up_adapters: int = 0
    bytes_plain: int = 0
    uploads: list[Upload] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def epsilon_max(self) -> float | None:
        """Largest ε that a client of this round has spent; None if no client tells."""
        spent = [u.metrics["epsilon"] for u in self.uploads if "epsilon" in u.metrics]
        return max(spent) if spent else None


class LedgerWatch:
    """Remembers how many private steps each client's ledger counted in this run."""

    def __init__(self) -> None:
        self._steps: dict[str, float] = {}

    def check(self, client: str, numbers: Mapping[str, float]) -> None:
        """Refuse a client whose ledger counts no more steps than before its last release.

        Raises
        ------
        FedLoRAError
            It does; a client that names no ``steps`` is not ours, and is let through.
        """
        steps = numbers.get("steps")
        if steps is None:
            return
        before = self._steps.get(client, 0.0)
        if steps <= before:
            raise FedLoRAError(
                f"its ledger counts {steps:g} private steps after {before:g} in an earlier round. "
                "It has lost rows, or is not the same file on every machine, or two clients share "
                "an identity"
            )
        self._steps[client] = steps


def uploaded_arrays(content: RecordDict) -> dict[str, NDArray[np.float32]]:
    """Read the arrays of a reply, as fp32.

    Raises
    ------
    InvalidValue
        The reply does not hold exactly one ArrayRecord, or an array is none of finite
        floating-point numbers within fp32's range.
    """
    if len(content.array_records) != 1:
        raise InvalidValue("ArrayRecords in a reply", len(content.array_records), "1")
    (record,) = content.array_records.values()
    return {name: _finite(name, to_numpy(array)) for name, array in record.items()}


def _finite(name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
    if array.dtype.kind != "f":
        raise InvalidValue(f"type of {name}", str(array.dtype), "floating-point numbers")
    with np.errstate(over="ignore"):
        values = np.asarray(array, np.float32)
    if not np.isfinite(values).all():
        raise InvalidValue(f"array {name}", "NaN or infinity", "finite numbers")
    return values


def scalars(content: RecordDict) -> tuple[dict[str, float], dict[str, str]]:
    """Read the numbers among a reply's metrics, and its texts."""
    numbers = {
        name: float(value)
        for record in content.metric_records.values()
        for name, value in record.items()
        if isinstance(value, int | float)
    }
    texts = {
        name: value
        for record in content.config_records.values()
        for name, value in record.items()
        if isinstance(value, str)
    }
    return numbers, texts


def scores_of(content: RecordDict) -> tuple[float, ...]:
    """Read the scores of a reply; none if it has none.

    Raises
    ------
    InvalidValue
        They are no list of finite numbers.
    """
    found = [record[SCORES] for record in content.metric_records.values() if SCORES in record]
    if not found:
        return ()
    if not isinstance(found[0], list) or not np.isfinite(found[0]).all():
        raise InvalidValue(SCORES, found[0], "a list of finite numbers")
    return tuple(float(value) for value in found[0])


def size_of(content: RecordDict, *, factors_only: bool = False) -> int:
    """Return the bytes of array data and scores in a message, as they travel."""
    arrays = sum(
        travel_size(array)
        for record in content.array_records.values()
        for name, array in record.items()
        if not factors_only or factor_of(name)
    )
    scores = sum(
        _NUMBER_BYTES * len(value)
        for record in content.metric_records.values()
        for value in record.values()
        if isinstance(value, list)
    )
    return arrays if factors_only else arrays + scores


def to_record(arrays: Arrays) -> ArrayRecord:
    """Pack arrays for the wire, in fp32: Flower refuses bfloat16."""
    return record_of(
        {
            name: from_numpy(np.ascontiguousarray(array, np.float32))
            for name, array in arrays.items()
        }
    )


_WORKER_DIED = "worker process has died"  # Ray's words
_NO_BRIDGE = "fitins.parameters"  # what Flower's own translation of a NumPyClient looks for
_RAISED = re.compile(r"<class '[\w.]+'>:<'(.*)'>", re.DOTALL)  # A SuperNode's, around an error's


def last_line(text: str | None) -> str:
    """Return the last line of an error's text that says something."""
    if _WORKER_DIED in (text or ""):
        return "its worker process died: killed, or out of memory"
    if _NO_BRIDGE in (text or ""):
        return "it is a NumPyClient: serve it with ClientApp(client_fn, mods=[fedlora_flwr.bridge])"
    text = _RAISED.sub(r"\1", text or "")
    lines = [line.strip() for line in text.splitlines() if line.strip(" '>")]
    return lines[-1] if lines else "no reason given"


def combine_metrics(metrics: Sequence[Mapping[str, float]]) -> MetricRecord:
    """Aggregate metrics: the largest ε, the mean of everything else that all clients report.

    ε is each client's own, so it is never averaged.
    """
    shared = set.intersection(*(set(entry) for entry in metrics)) if metrics else set()
    columns = {name: [entry[name] for entry in metrics] for name in sorted(shared)}
    return MetricRecord(
        {
            name: max(values) if name == "epsilon" else float(np.mean(values))
            for name, values in columns.items()
        }
    )


def aggregate_metrics(records: list[RecordDict], weighting_metric_name: str) -> MetricRecord:
    """Aggregate metrics as `combine_metrics` does, under the signature that Flower calls."""
    del weighting_metric_name
    return combine_metrics(
        [
            {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
            for content in records
            for record in content.metric_records.values()
        ]
    )
