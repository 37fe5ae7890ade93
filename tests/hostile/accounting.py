"""What a ledger's rows have spent, by an accountant that the package does not use for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

Row = Mapping[str, Any]
ORDERS = (1.5, 2, 2.5, 3, 3.5, *range(4, 33), 40, 48, 64, 96, 128)
# Both accountants round up. So do the package's, and not by the same amount.
SLACK = 1.02


def composed_epsilon(rows: Sequence[Row], delta: float) -> float:
    """Return ε of settings that were fixed beforehand, by privacy loss distributions."""
    return _composed(tuple(_mechanisms(rows).items()), delta)


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
    for all branches that share a beginning. Any order is a proof, also the one that a row names.
    """
    named = {row["rdp_order"] for rows in branches for row in rows if row.get("rdp_order")}
    return any(
        all(_divergence(rows, order) <= allowance(epsilon, delta, order) for rows in branches)
        for order in (*named, *ORDERS)
    )


def allowance(epsilon: float, delta: float, order: float) -> float:
    """Return what a filter of an order may let through for (ε, δ).

    The conversion is that of arXiv 2004.00010, proposition 12, solved for the divergence. Rounding
    is allowed for.
    """
    log_rest = math.log1p(-1 / order)
    return epsilon - log_rest + (math.log(delta) + math.log(order)) / (order - 1) + 1e-6


def _divergence(rows: Sequence[Row], order: float) -> float:
    return sum(steps * _each(*key, order) for key, steps in _mechanisms(rows).items())


def _mechanisms(rows: Sequence[Row]) -> dict[tuple[float, float], int]:
    """Return the steps of each σ and q."""
    found: dict[tuple[float, float], int] = {}
    for row in rows:
        key = row["noise_multiplier"], row["sample_rate"]
        found[key] = found.get(key, 0) + int(row["steps"])
    return found


@cache
def _composed(mechanisms: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for key, steps in mechanisms:
        accountant.compose(_step(*key), steps)
    return float(accountant.get_epsilon(delta))


@cache
def _each(noise_multiplier: float, sample_rate: float, order: float) -> float:
    accountant = RdpAccountant([order])
    accountant.compose(_step(noise_multiplier, sample_rate))
    return float(accountant._rdp[0])


def _step(noise_multiplier: float, sample_rate: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian)
