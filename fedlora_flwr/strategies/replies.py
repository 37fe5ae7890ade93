"""Clients' answers, and the report of a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.common.logger import log

from fedlora_flwr.algebra.means import Arrays, bounded
from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.errors import FederationAborted, FedLoRAError, InvalidValue, SuspectReply
from fedlora_flwr.layout import factor_of
from fedlora_flwr.wire import DELTA, EPSILON, EPSILON_BUDGET, MOST_ENTRY, STEPS, WEIGHT
from fedlora_flwr.wire.arrays import from_numpy, record_of, travel_size
from fedlora_flwr.wire.limits import Number, Residues
from fedlora_flwr.wire.report import Report

MOST_TIMES_MEDIAN = 10


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
    shares : Mapping[str, ndarray]
        Under a secure sum, in place of arrays.
    added : frozenset[str]
        Names of the arrays that were added to the round's sums, and not kept.
    sums : UpdateSums, optional
        The sums of which this is the mean.
    """

    client: str
    arrays: Arrays
    weight: float
    metrics: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)
    shares: Mapping[str, Residues] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    sums: UpdateSums | None = None

    @classmethod
    def of(
        cls, client: str, found: Report, weighting: str, weighted_by: str, most: float
    ) -> Upload:
        """Take what a client reported.

        Raises
        ------
        InvalidValue
            It states no weight that can be used (see `weight_of`).
        """
        numbers = {word: float(value) for word, value in found.numbers().items()}
        texts = {word: v for word, v in found.texts().items() if isinstance(v, str)}
        weight = weight_of(numbers, weighting, weighted_by, most)
        return cls(client, dict(found.arrays), weight, numbers, texts, dict(found.shares))

    @property
    def names(self) -> frozenset[str]:
        """Names of the arrays that the client sent."""
        return self.added or frozenset(self.arrays) | frozenset(self.shares)


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
        Bytes of array data in the messages sent and in the replies.
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
    suspects : list[str]
        Clients whose uploads look as if they were meant to do harm.
    details : dict[str, Any]
        What else the strategy has to tell of the round; it goes to the round's row.
    compared : dict[str, Any]
        What the uploads tell about each other (see `fedlora_flwr.strategies.agreement.describe`).
    evaluation : dict[str, float] or None
        Metrics that clients measured on public records, where the server has no model to measure:
        empty if none could. None where the server measures.
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
    suspects: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] | None = None

    def count(self, content: RecordDict, plain: int) -> None:
        """Count the bytes of a reply, and those that plain averaging would have sent."""
        for record in content.array_records.values():
            for name, array in record.items():
                size = travel_size(array)
                self.bytes_up += size
                self.bytes_up_adapters += size if factor_of(name) else 0
        self.bytes_plain += plain

    def fail(self, who: str, reason: object) -> None:
        """Count a reply as its sender's failure."""
        self.failures.append(one_line(f"{who}: {reason}"))
        if isinstance(reason, SuspectReply):
            self.suspect([who])

    def suspect(self, clients: Iterable[str]) -> None:
        """Name clients as suspects of this round, each once."""
        self.suspects = sorted({*self.suspects, *clients})

    @property
    def epsilon_max(self) -> float | None:
        """Largest ε that a client of this round has spent; None if no client tells."""
        spent = [u.metrics[EPSILON] for u in self.uploads if EPSILON in u.metrics]
        return max(spent) if spent else None

    def settle(self, min_completion: float, *, may_decline: bool = False) -> None:
        """Keep what can be averaged, in an order that does not depend on when replies arrive.

        Parameters
        ----------
        min_completion : float
            Share of the clients that must have answered.
        may_decline : bool (default: False)
            Whether the run goes on if all clients of the round have spent their budgets.

        Raises
        ------
        FederationAborted
            Fewer than ``min_completion`` of the clients answered, or no answer holds arrays.
        """
        self._agree()
        self.uploads.sort(key=lambda upload: upload.client)
        self._tell()
        self._check_completion(min_completion, may_decline)
        weights = cap_weights([upload.weight for upload in self.uploads])
        self.uploads = [
            upload if weight == upload.weight else replace(upload, weight=weight)
            for upload, weight in zip(self.uploads, weights, strict=True)
        ]

    def settle_void(self, min_completion: float) -> tuple[None, None]:
        """Keep a round in which nobody was asked to train: it has no arrays and no metrics.

        Raises
        ------
        FederationAborted
            Fewer than ``min_completion`` of the clients answered.
        """
        self._tell()
        self._check_answered(self.sent - len(self.failures), min_completion)
        return None, None

    def _tell(self) -> None:
        """Log who failed or declined, and why."""
        self.failures.sort()
        self.declined.sort()
        for line in (*self.failures, *self.declined):
            log(WARNING, "\t> round %d: %s", self.server_round, line)

    def _agree(self) -> None:
        """Keep the uploads of the arrays that most clients sent: others cannot be averaged."""
        if not self.uploads:
            return
        common = most_common([upload.names for upload in self.uploads])
        for upload in self.uploads:
            if wrong := sorted(upload.names ^ common):
                self.fail(upload.client, f"it uploaded other arrays than most clients: {wrong}")
        self.uploads = [u for u in self.uploads if u.names == common]

    def _check_completion(self, min_completion: float, may_decline: bool) -> None:
        self._check_answered(len(self.uploads) + len(self.declined), min_completion)
        if not self.uploads and (self.failures or not may_decline):
            raise FederationAborted(
                f"Round {self.server_round}: no client sent arrays. Reasons: {self._reasons}"
            )

    def _check_answered(self, answered: int, min_completion: float) -> None:
        if self.sent and answered < min_completion * self.sent:
            raise FederationAborted(
                f"Round {self.server_round}: {answered} of {self.sent} clients answered, "
                f"fewer than min-completion = {min_completion:g}. Reasons: {self._reasons}"
            )

    @property
    def _reasons(self) -> str:
        lines = [*self.failures, *self.declined]
        return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if lines[5:] else "")


class LedgerWatch:
    """Remembers how many private steps each client's ledger counted in this run."""

    def __init__(self) -> None:
        self._steps: dict[str, float] = {}

    def state_dict(self) -> dict[str, float]:
        """Return the steps by client."""
        return dict(self._steps)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Remember the steps of a state."""
        self._steps = dict(state)

    def check(self, client: str, numbers: Mapping[str, float], ordered: int = 0) -> None:
        """Refuse a client whose ledger counts no more steps than before its last release.

        Parameters
        ----------
        client : str
            Who it is.
        numbers : Mapping[str, float]
            What it reports; a client that names no ``steps`` is not ours, and is let through.
        ordered : int
            Steps that a round has; 0 where that is not known.

        Raises
        ------
        FedLoRAError
            Its ledger has not counted this round's steps.
        """
        steps = numbers.get(STEPS)
        if steps is None:
            return
        before = self._steps.get(client, 0.0)
        if steps <= before:
            raise FedLoRAError(
                f"its ledger counts {steps:g} private steps after {before:g} in an earlier round. "
                "It has lost rows, or is not the same file on every machine, or two clients share "
                "an identity"
            )
        if steps < before + ordered:
            raise FedLoRAError(
                f"its ledger counts {steps:g} private steps after {before:g} in an earlier round, "
                f"but a round has {ordered}"
            )
        self._steps[client] = steps


def to_record(arrays: Arrays) -> ArrayRecord:
    """Pack arrays for the wire, in fp32: Flower refuses bfloat16."""
    return record_of(
        {
            name: from_numpy(np.ascontiguousarray(array, np.float32))
            for name, array in arrays.items()
        }
    )


def within_limits(arrays: Arrays) -> Arrays:
    """Keep the next global arrays within what clients accept."""
    found = bounded(arrays, MOST_ENTRY)
    cut = [name for name, array in found.items() if array is not arrays[name]]
    if cut:
        log(WARNING, "Entries above %g were cut to it, e.g. in %s.", MOST_ENTRY, cut[0])
    return found


_LONGEST_LINE = 2000  # characters


def one_line(text: str) -> str:
    """Return a text as a log may show it: on one line, of bounded length, without escapes."""
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def combine_metrics(metrics: Sequence[Mapping[str, float]]) -> MetricRecord:
    """Aggregate metrics: the largest ε that anybody tells, and means of what all clients report.

    ε is each client's own, so it is never averaged. Its budget is that of the same client: the mean
    of all budgets could be smaller than the largest ε, as if that client had spent too much.
    """
    shared = set.intersection(*(set(entry) for entry in metrics)) if metrics else set()
    told = [entry for entry in metrics if EPSILON in entry]
    means = {name: float(np.mean([m[name] for m in metrics])) for name in sorted(shared)}
    if told:
        most = max(told, key=lambda entry: entry[EPSILON])
        for name in (EPSILON, EPSILON_BUDGET, DELTA):
            means.pop(name, None)
            if name in most:
                means[name] = most[name]
    return _record(means)


def weighted_figures(
    reports: Sequence[Mapping[str, float]], weighted_by: str
) -> MetricRecord | None:
    """Average figures as Flower's own strategies do; None where no report has a weight.

    Parameters
    ----------
    reports : Sequence[Mapping[str, float]]
        One mapping per client, all with the same names.
    weighted_by : str
        The name among them that is the weight, and no figure.
    """
    weights = cap_weights([max(report.get(weighted_by, 0.0), 0.0) for report in reports])
    total = sum(weights)
    if not total:
        return None
    means: dict[str, float] = {}
    for weight, report in zip(weights, reports, strict=True):
        for name, value in report.items():
            if name != weighted_by:
                means[name] = means.get(name, 0.0) + value * (weight / total)
    return _record(means)


def weight_of(metrics: Mapping[str, float], weighting: str, weighted_by: str, most: float) -> float:
    """Return the aggregation weight that a client states.

    Raises
    ------
    InvalidValue
        It states none, or one that is not above 0 and at most ``most``.
    """
    if weighting == "uniform":
        return 1.0
    keys = (WEIGHT, weighted_by) if weighting == "size" else (WEIGHT,)
    found = [metrics[key] for key in keys if key in metrics]
    if not found:
        raise InvalidValue("reply metrics", sorted(metrics), f"one of {keys}")
    return Number(0, most, above=True).read(WEIGHT, found[0])


def most_common(sets: Sequence[frozenset[str]]) -> frozenset[str]:
    """Return the set of names that most clients sent; of sets as common, the largest."""
    counts = Counter(sets)
    return max(counts, key=lambda names: (counts[names], len(names), sorted(names)))


def cap_weights(weights: Sequence[float]) -> list[float]:
    """Cut weights to ten times the (lower) median of all.

    Clients state their weights, and nobody can check them. With N clients of equal weight one that
    lies gets a share of at most 10 / (N + 9) of a mean, instead of all of it.
    """
    most = MOST_TIMES_MEDIAN * sorted(weights)[(len(weights) - 1) // 2] if weights else 0.0
    return [min(weight, most) for weight in weights]


def _record(means: dict[str, float]) -> MetricRecord:
    return MetricRecord(dict(means.items()))
