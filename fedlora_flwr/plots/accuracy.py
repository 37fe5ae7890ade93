"""Accuracy against the privacy budget, by method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.plots.figures import save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MARKERS = "osD^vP*X<>hp"


# Methods are set side by side, so that error bars do not hide each other. Together they take up to
# this share of the gap between two ticks, to either side.
SPREAD = 0.36


def plot_accuracy(runs: pd.DataFrame, path: Path, metric: str, data: str) -> None:
    """Draw the final metric of every run against ε, with each method's mean and standard error.

    Methods are drawn slightly apart on the ε axis. A line joins a method's means over ε. Runs
    without privacy have no ε: they are drawn apart, with hollow marks and without a line. The
    metric's axis covers the runs, and its ends are multiples of 0.05.

    Parameters
    ----------
    runs : pandas.DataFrame
        One row per run: ``row`` (the method's name), ``epsilon`` (infinity: no privacy), ``seed``
        and ``final`` (a fraction; a run with NaN failed and is left out).
    path : Path
        The PNG file, written atomically.
    metric : str
        Name of the figure.
    data : str
        Name of the data, for the title.
    """
    save(accuracy_figure(runs, metric, data), path)


def accuracy_figure(runs: pd.DataFrame, metric: str, data: str) -> Figure:
    """Make the picture of `plot_accuracy`, from the same parameters."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    ticks = _positions(sorted(runs["epsilon"].unique()))
    methods = list(dict.fromkeys(runs["row"]))
    colors = (*colormaps["tab10"].colors, "black")  # type: ignore[attr-defined]
    for number, method in enumerate(methods):
        look: dict[str, Any] = {
            "color": colors[number % len(colors)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "--", ":")[number // len(colors) % 3],
        }
        places = {e: tick + _offset(number, len(methods), ticks) for e, tick in ticks.items()}
        _draw_method(axes, runs[runs["row"] == method].dropna(subset="final"), places, look)
    _mark_budgets(axes, ticks)
    axes.set_ylabel(f"{metric.replace('_', ' ')} after the last round")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylim(*_limits(runs["final"].dropna()))
    axes.set_title(_title(runs, metric, data), fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _draw_method(
    axes: Axes, runs: pd.DataFrame, places: dict[float, float], look: dict[str, Any]
) -> None:
    """Draw every run as a dot, and means with standard errors where there are several seeds."""
    axes.plot(
        [places[e] for e in runs["epsilon"]], runs["final"], linestyle="", marker="o",
        markersize=3.2, color=look["color"], alpha=0.35, markeredgewidth=0,
    )  # fmt: skip
    found = runs.groupby("epsilon")["final"].agg(["mean", "sem"])
    private = found.loc[[epsilon for epsilon in found.index if math.isfinite(epsilon)]]
    for part, fill in ((private, "full"), (found.drop(private.index), "none")):
        if fill == "full" or len(part):
            axes.errorbar(
                [places[epsilon] for epsilon in part.index], part["mean"], yerr=part["sem"],
                label=str(runs["row"].iloc[0]) if fill == "full" and len(runs) else None,
                fillstyle=fill, markersize=5, linewidth=0.9, elinewidth=1.1, capsize=2.5, **look,
            )  # fmt: skip


def _limits(finals: Iterable[float]) -> tuple[float, float]:
    """Return the multiples of 0.05 between which all figures lie; 0 and 1 without a figure."""
    found = [math.floor(20 * final + 1e-9) for final in finals] or [0, 19]
    return min(found) / 20, (max(found) + 1) / 20


def _title(runs: pd.DataFrame, metric: str, data: str) -> str:
    budgets = sorted(runs["epsilon"].unique())
    finite = [f"{epsilon:g}" for epsilon in budgets if math.isfinite(epsilon)]
    names = [f"ε = {', '.join(finite)}"] if finite else []
    names += ["no privacy"] if len(finite) < len(budgets) else []
    seeds = sorted(runs["seed"].unique())
    few = (
        f"seed {seeds[0]}, so there are no error bars"
        if len(seeds) == 1
        else f"seeds {seeds[0]} to {seeds[-1]}"
        if seeds[-1] - seeds[0] == len(seeds) - 1
        else f"{len(seeds)} seeds"
    )
    bars = "" if len(seeds) == 1 else "\ndots: runs; marks and bars: mean ± standard error"
    return f"{data}: {metric.replace('_', ' ')} at {' and '.join(names)}, {few}{bars}"


def _positions(budgets: Sequence[float]) -> dict[float, float]:
    """Place budgets on a logarithmic axis, and infinity (no privacy) one step past the largest."""
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
    labels = ["no privacy" if math.isinf(budget) else f"{budget:g}" for budget in ticks]
    axes.set_xticks(list(ticks.values()), labels=labels)
    axes.set_xlabel("privacy budget ε (log scale)")
    places = sorted(ticks.values())
    if math.inf in ticks and len(places) > 1:
        axes.axvspan((places[-2] + places[-1]) / 2, places[-1] * 2 + 9, color="0.5", alpha=0.07)
        axes.set_xlim(1.5 * places[0] - 0.5 * places[1], 1.5 * places[-1] - 0.5 * places[-2])
