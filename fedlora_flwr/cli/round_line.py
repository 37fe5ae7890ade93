"""A round in one line. This file imports no torch, so that `fedlora watch` starts at once."""

from __future__ import annotations

import math

from fedlora_flwr.server.rounds import RoundRow, by_name


def describe_round(row: RoundRow, metric: str = "accuracy") -> str:
    """Return the result of one round in one line."""
    parts = []
    if metric in row:
        parts.append(f"{words(metric)} {by_name(row)[metric]:.1%}")
    elif "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    spent = row.get("epsilon_max")
    if spent is not None and math.isfinite(spent):
        parts.append(f"ε {spent:.2f}")
    if row.get("failures"):
        parts.append(f"{len(row['failures'])} failed")
    if row.get("suspects"):
        parts.append(f"suspects: {', '.join(row['suspects'])}")
    return "  ".join(parts) or "not evaluated"


def words(metric: str) -> str:
    """Return a metric's name as words."""
    return metric.replace("_", " ")
