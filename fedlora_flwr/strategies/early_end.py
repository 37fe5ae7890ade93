"""The result of a run that ends before its last round, which Flower has no words for."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def keeping(result: Result, evaluate_fn: EvaluateFn | None) -> EvaluateFn | None:
    """Return the same evaluation, which also keeps its metrics in ``result``."""
    if evaluate_fn is None:
        return None

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = evaluate_fn(server_round, arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
        return metrics

    return evaluate
