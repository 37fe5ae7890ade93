"""A picture of a run's rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import HEAD, PARTS
from fedlora_flwr.plots.figures import MODES, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {**MODES, HEAD: "#CC79A7"}
Rows = Sequence[Mapping[str, object]]
Points = list[tuple[int, float]]


def plot_rounds(rows: Rows, path: Path, metric: str, run: str = "") -> None:
    """Draw a run round by round: metric, agreement of uploads, noise, and the error of averaging.

    Parameters
    ----------
    rows : Sequence[Mapping[str, Any]]
        The rows of ``rounds.jsonl``. A figure that a round lacks leaves a gap.
    path : Path
        The PNG file, written atomically.
    metric : str
        Name of the metric.
    run : str (default: "")
        A name of the run, for the title.

    Raises
    ------
    InvalidValue
        No round is finished.
    """
    save(rounds_figure(rows, metric, run), path)


def rounds_figure(rows: Rows, metric: str, run: str = "") -> Figure:
    """Make the picture of `plot_rounds`, from the same parameters."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    if len(rows) < 2:
        raise InvalidValue("rounds", max(len(rows) - 1, 0), "at least one that is finished")
    figure = Figure(figsize=(8.5, 9.5), layout="constrained")
    if run:
        figure.suptitle(run, fontsize=11)
    axes = figure.subplots(4, 1, sharex=True)
    _line(axes[0], _points(rows, metric), "black", "-", None)
    axes[0].set_title(f"{metric.replace('_', ' ').capitalize()} on the public records")
    for part in PARTS:
        color, label = COLORS[part], part if part == HEAD else f"factor {part}"
        _line(axes[1], _points(rows, "agreement", part), color, "-", label)
        _line(axes[2], ratios(rows, "spread", part), color, "-", None)
        _line(axes[2], ratios(rows, "noise", part), color, ":", None)
    axes[1].set_title("Agreement of the uploads (mean cosine of all pairs)")
    axes[1].axhline(0, color="gray", linewidth=0.8)
    dotted = "; dotted: the noise of privacy" if any("noise" in row for row in rows) else ""
    axes[2].set_title(f"Noise and differences in the mean, over what uploads share{dotted}")
    if any(np.isfinite(line.get_ydata()).any() for line in axes[2].lines):
        axes[2].set_yscale("log")
        # Labels read 20 instead of 2 x 10^1.
        axes[2].yaxis.set_major_formatter(LogFormatter())
        axes[2].yaxis.set_minor_formatter(LogFormatter())
    _line(axes[3], _points(rows, "mean_error"), "black", "-", None)
    axes[3].set_title("Error of averaging factors, relative to the mean of the products")
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel("round")
    axes[3].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.title.set_fontsize(10)
    if axes[1].get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def ratios(rows: Rows, figure: str, part: str) -> Points:
    """Return a figure divided by the round's signal, and NaN (a gap) if the signal is 0."""
    signals = dict(_points(rows, "signal", part))
    found = _points(rows, figure, part)
    return [(n, value / signals[n] if signals[n] > 0 else np.nan) for n, value in found]


def _points(rows: Rows, figure: str, part: str | None = None) -> Points:
    found = []
    for row in rows:
        value: Any = row.get(figure)
        if part is not None:
            value = (value or {}).get(part)
        if value is not None:
            found.append((cast(int, row["round"]), float(value)))
    return found


def _line(axes: Axes, points: Points, color: str, style: str, label: str | None) -> None:
    """Draw points with a line through them. The line also spans rounds without a point."""
    if points:
        numbers, values = zip(*points, strict=True)
        axes.plot(
            numbers, values, style, color=color, label=label, marker=".", markersize=4,
            linewidth=1.2,
        )  # fmt: skip
