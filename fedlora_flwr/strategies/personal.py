"""Models of which a part stays with each client: what travels, and who measures them."""

from __future__ import annotations

from collections.abc import Sequence
from logging import WARNING

from flwr.app import ArrayRecord, MetricRecord
from flwr.common.logger import log

from fedlora_flwr.layout import is_shared
from fedlora_flwr.strategies.replies import RoundReport, combine_metrics
from fedlora_flwr.wire.arrays import record_of
from fedlora_flwr.wire.report import Report


def shared_part(arrays: ArrayRecord, shared: str) -> ArrayRecord:
    """Return the arrays that travel; where all do, the record as it is."""
    if not shared:
        return arrays
    return record_of({name: array for name, array in arrays.items() if is_shared(name, shared)})


def mean_of_own_models(
    reports: Sequence[tuple[str, Report]], report: RoundReport
) -> MetricRecord | None:
    """Average what clients measured on their own models; None if no client measured.

    A device may refuse to measure, so that is not a reason to end the run.
    """
    if not reports:
        log(WARNING, "\t> round %d: no client measured its model.", report.server_round)
        return None
    # In a fixed order, since sums depend on it.
    mean = combine_metrics([found.figures() for _, found in reports])
    report.evaluation = {k: v for k, v in mean.items() if isinstance(v, float)}
    return mean
