"""What a ledger's rows have spent, by an accountant that the package does not use for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

Row = Mapping[str, Any]
ORDERS = [*(1 + i / 10 for i in range(1, 100)), *range(11, 65), *range(66, 513, 4)]
# Both accountants round up. So do the package's, and not by the same amount.
SLACK = 1.02


def composed_epsilon(rows: Sequence[Row], delta: float) -> float:
    """Return ε of settings that were fixed beforehand, by privacy loss distributions."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for row in rows:
        accountant.compose(_event(row))
    return float(accountant.get_epsilon(delta))


def divergences(rows: Sequence[Row]) -> list[float]:
    """Return the Rényi divergence of all rows together, at each of `ORDERS`."""
    accountant = RdpAccountant(ORDERS)
    for row in rows:
        accountant.compose(_event(row))
    return [float(value) for value in accountant._rdp]


def allowances(epsilon: float, delta: float) -> list[float]:
    """Return what a filter of each order may let through for (ε, δ).

    The conversion is that of arXiv 2004.00010, proposition 12, solved for the divergence.
    """
    return [
        epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1) for order in ORDERS
    ]


def is_bounded_by_first(rows: Sequence[Row], epsilon: float, delta: float) -> bool:
    """Tell whether all steps are post-processing of the first row's, which fit in the budget."""
    first = rows[0]
    noisier = all(row["noise_multiplier"] >= first["noise_multiplier"] for row in rows)
    rarer = all(row["sample_rate"] <= first["sample_rate"] for row in rows)
    steps = sum(row["steps"] for row in rows)
    return (
        noisier
        and rarer
        and composed_epsilon([{**first, "steps": steps}], delta) <= (epsilon * SLACK)
    )


def is_a_filter(branches: Sequence[Sequence[Row]], epsilon: float, delta: float) -> bool:
    """Tell whether one order bounds every branch that a server may choose while it looks on.

    A Rényi filter is valid if its order was fixed before the first release. So one order must do
    for all branches that share a beginning.
    """
    found = [divergences(rows) for rows in branches]
    limits = allowances(epsilon, delta)
    return any(all(branch[i] <= limit + 1e-9 for branch in found) for i, limit in enumerate(limits))


def _event(row: Row) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(row["noise_multiplier"])
    sampled = dp_accounting.PoissonSampledDpEvent(row["sample_rate"], gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, int(row["steps"]))
