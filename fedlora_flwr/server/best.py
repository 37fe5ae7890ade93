"""The best model of a run by the server's own evaluations, and whether to wait for a better one.

Only figures that the server measures on public records count. The choice therefore costs no ε: it
is made of releases, and of records that the promise does not cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config.sections import RunSection
from fedlora_flwr.errors import unknown


class Best:
    """The best evaluation so far, and the arrays that were measured.

    Parameters
    ----------
    settings : RunSection
        ``metric_for_best_model``, ``early_stopping_patience`` and ``early_stopping_threshold``.
    metric : str
        The task's metric, which is compared unless the settings name another.

    Attributes
    ----------
    metric : str
        Name of the metric that is compared.
    round : int or None
        The best round; None before the first evaluation.
    metrics : Mapping[str, float]
        What was measured after it.
    arrays : Arrays
        The arrays that were measured then.
    waited : int
        Evaluations since the last one that was better by more than the threshold.

    Examples
    --------
    >>> best = Best(RunSection(early_stopping_patience=2), "accuracy")
    >>> [best.take(n, {"accuracy": a}, {}) for n, a in enumerate([0.1, 0.5, 0.4, 0.5])]
    [True, True, False, False]
    >>> best.round, best.stops
    (1, True)
    """

    def __init__(self, settings: RunSection, metric: str) -> None:
        self.metric = settings.metric_for_best_model or metric
        self._patience = settings.early_stopping_patience
        self._threshold = settings.early_stopping_threshold
        self.round: int | None = None
        self.metrics: Mapping[str, float] = {}
        self.arrays: Arrays = {}
        self.waited = 0
        self._reference: float | None = None

    def take(self, server_round: int, metrics: Mapping[str, float], arrays: Arrays) -> bool:
        """Compare an evaluation with the best one; return whether it is better.

        Parameters
        ----------
        server_round : int
            The round, from 0.
        metrics : Mapping[str, float]
            What the server measured.
        arrays : Arrays
            What it measured, kept if it is the best.

        Raises
        ------
        InvalidValue
            The evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise unknown("metric-for-best-model", self.metric, metrics)
        value = metrics[self.metric]
        if self._beyond(value, self._reference, self._threshold):
            self._reference, self.waited = value, 0
        elif server_round:  # Round 0, before training, waits for nothing.
            self.waited += 1
        found = self._beyond(value, self.metrics.get(self.metric))
        if found:
            self.round, self.metrics, self.arrays = server_round, dict(metrics), dict(arrays)
        return found

    @property
    def stops(self) -> bool:
        """Whether the run has waited long enough for a better evaluation."""
        return 0 < self._patience <= self.waited

    @property
    def why(self) -> str:
        """Why the run ends early, in words; empty if it does not."""
        if not self.stops:
            return ""
        better = f"by more than {self._threshold:g} " if self._threshold else ""
        times = f"{self.waited} evaluation{'s' * (self.waited != 1)}"
        return f"{self.metric} has not improved {better}for {times}"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What a run's summary tells of its best round; None where the server measured nothing."""
        if self.round is None:
            return None
        return {"round": self.round, "chosen_by": self.metric, "metrics": dict(self.metrics)}

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried from one round to the next."""
        return {
            "round": self.round, "metrics": dict(self.metrics), "arrays": dict(self.arrays),
            "waited": self.waited, "reference": self._reference,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned; a run of an earlier version has nothing."""
        if state:
            self.round, self.metrics, self.arrays = (
                state["round"],
                state["metrics"],
                state["arrays"],
            )
            self.waited, self._reference = state["waited"], state["reference"]

    def _beyond(self, value: float, other: float | None, by: float = 0.0) -> bool:
        """Tell whether a value is better than another; one that is not a number never is."""
        if other is None:
            return value == value
        return is_better(self.metric, value, other, by)


def is_better(metric: str, value: float, other: float, by: float = 0.0) -> bool:
    """Tell whether a value of a metric is better; a loss and a perplexity are better if smaller.

    Parameters
    ----------
    metric : str
        The metric's name.
    value, other : float
        The values. One that is not a number is never better.
    by : float (default: 0.0)
        By how much more than this it has to be better.
    """
    smaller = "loss" in metric or metric == "perplexity"
    return other - value > by if smaller else value - other > by
