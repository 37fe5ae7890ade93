"""Accuracy against the privacy budget, by method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.plots.figures import save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MARKERS = "osD^vP*X<>"


# Overlapping error bars hide each other: methods are set side by side within this share of a tick.
SPREAD = 0.22


def plot_accuracy(table: pd.DataFrame, path: Path, metric: str) -> None:
    """Draw the final metric against ε, one line a method, with error bars.

    Methods are set a little apart on the ε axis. A point without a mean is left out.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``row`` (the method's name), ``epsilon`` (infinity: no privacy), ``mean`` and
        ``std`` (fractions; NaN where there is none).
    path : Path
        The PNG file, written atomically.
    metric : str
        Name of the figure.
    """
    save(accuracy_figure(table, metric), path)


def accuracy_figure(table: pd.DataFrame, metric: str) -> Figure:
    """Make the picture of `plot_accuracy`; parameters as there."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    ticks = _positions(sorted(table["epsilon"].unique()))
    methods = list(dict.fromkeys(table["row"]))
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, method in enumerate(methods):
        rows = table[table["row"] == method].sort_values("epsilon")
        axes.errorbar(
            [ticks[e] + _offset(number, len(methods), ticks) for e in rows["epsilon"]],
            rows["mean"],
            yerr=rows["std"],
            label=method,
            color=colors[number % len(colors)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=("-", "--", ":")[number // len(colors) % 3],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.9,
            capsize=2,
        )
    _mark_budgets(axes, ticks)
    axes.set_ylabel(f"{metric} after the last round")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title(f"{metric.capitalize()} against privacy budget")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _positions(budgets: Sequence[float]) -> dict[float, float]:
    """Place budgets on a logarithmic axis, none (infinity) one step past the largest."""
    finite = [budget for budget in budgets if math.isfinite(budget)]
    places = {budget: math.log10(budget) for budget in finite}
    if len(finite) < len(budgets):
        gaps = len(finite) - 1
        step = (places[finite[-1]] - places[finite[0]]) / gaps if gaps > 0 else 0.5
        places[math.inf] = places[finite[-1]] + step if finite else 0.0
    return places


def _offset(number: int, count: int, ticks: dict[float, float]) -> float:
    places = sorted(ticks.values())
    gap = min((b - a for a, b in pairwise(places)), default=1.0)
    return SPREAD * gap * (2 * (number + 0.5) / count - 1)


def _mark_budgets(axes: Axes, ticks: dict[float, float]) -> None:
    labels = ["none" if math.isinf(budget) else f"{budget:g}" for budget in ticks]
    axes.set_xticks(list(ticks.values()), labels=labels)
    axes.set_xlabel("privacy budget ε (log scale; none = no privacy)")
    places = sorted(ticks.values())
    if math.inf in ticks and len(places) > 1:
        axes.axvline((places[-2] + places[-1]) / 2, color="gray", linewidth=0.8, linestyle=":")
