"""Pictures of results. matplotlib is imported where it draws, so that runs start without it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replace_file
from fedlora_flwr.plan import ComponentPlan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MARKERS = "osD^vP*X<>"
# Of a palette that colour-blind readers can tell apart (Okabe and Ito).
MODES = {"A": "#0072B2", "B": "#E69F00", "AB": "#009E73"}
MODE_NAMES = {"A": "A", "B": "B", "AB": "A and B"}
# Overlapping error bars hide each other: methods are set side by side within this share of a tick.
SPREAD = 0.22
# More colours than these cannot be told apart: a heat map takes over.
MAX_COLOURS = 20


def plot_accuracy(table: pd.DataFrame, path: Path, metric: str) -> None:
    """Draw the final metric against ε, one line a method, with error bars.

    Methods are set a little apart on the ε axis. A point without a mean is left out.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``row`` (the method's name), ``epsilon`` (infinity: no privacy), ``mean`` and
        ``std`` (fractions; NaN where there is none).
    path : Path
        The PNG file, written in one piece.
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
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, method in enumerate(methods):
        rows = table[table["row"] == method].sort_values("epsilon")
        axes.errorbar(
            [ticks[e] + _offset(number, len(methods), ticks) for e in rows["epsilon"]],
            rows["mean"],
            yerr=rows["std"],
            label=method,
            color=colours[number % len(colours)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=("-", "--", ":")[number // len(colours) % 3],
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


def plot_modes(plans: Sequence[str], blocks: Sequence[str], path: Path) -> None:
    """Draw which factor each block trained in each round, the first block at the top.

    Parameters
    ----------
    plans : Sequence[str]
        The rounds' plans, as `fedlora_flwr.plan.ComponentPlan` writes them. A block that trains A
        at one step and B at another counts as both.
    blocks : Sequence[str]
        Names of the blocks, in model order.
    path : Path
        The PNG file, written in one piece.

    Raises
    ------
    InvalidValue
        There is no round or no block, or a plan is for another number of blocks.
    """
    save(modes_figure(plans, blocks), path)


def modes_figure(plans: Sequence[str], blocks: Sequence[str]) -> Figure:
    """Make the picture of `plot_modes`; parameters as there."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    rounds, names = len(plans), list(MODES)
    columns = [_modes(ComponentPlan.parse(plan), len(blocks)) for plan in plans]
    if not rounds or not blocks:
        raise InvalidValue("plans", f"{rounds} rounds, {len(blocks)} blocks", "at least one each")
    grid = [[names.index(column[block]) for column in columns] for block in range(len(blocks))]
    height = 1.5 + max(0.19 * len(blocks), 1.0)
    figure = Figure(figsize=(min(5 + 0.09 * rounds, 16), height), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(
        [number + 0.5 for number in range(rounds + 1)],
        [number - 0.5 for number in range(len(blocks) + 1)],
        grid,
        cmap=ListedColormap(list(MODES.values())),
        vmin=0,
        vmax=len(names) - 1,
        edgecolors="white",
        linewidth=0.8 if rounds <= 60 else 0.25,
    )
    axes.invert_yaxis()
    axes.set_yticks(range(len(blocks)), labels=list(blocks), fontsize=9 if len(blocks) < 24 else 8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, rounds + 0.5)
    axes.set(xlabel="round", ylabel="block", title="Factors that each block trained")
    shown = [Patch(color=MODES[name], label=MODE_NAMES[name]) for name in names]
    figure.legend(handles=shown, loc="outside right upper", frameon=False)
    return figure


def plot_split(counts: pd.DataFrame, path: Path, label: str) -> None:
    """Draw each client's records by class: bars, or a heat map above 20 classes.

    Parameters
    ----------
    counts : pandas.DataFrame
        Records: one row a client, the first at the top, one column a class.
    path : Path
        The PNG file, written in one piece.
    label : str
        What the records are, for the title.

    Raises
    ------
    InvalidValue
        There is no client or no class.
    """
    save(split_figure(counts, label), path)


def split_figure(counts: pd.DataFrame, label: str) -> Figure:
    """Make the picture of `plot_split`; parameters as there."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    if not clients or not classes:
        raise InvalidValue("counts", f"{clients} clients, {classes} classes", "at least one each")
    height = min(1.6 + 0.22 * max(clients, 4), 14)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.add_subplot()
    (_draw_bars if classes <= MAX_COLOURS else _draw_heat)(axes, counts)
    axes.set_ylim(clients - 0.4, -0.6)
    step = math.ceil(clients / 50)
    axes.set_yticks(range(0, clients, step), labels=list(map(str, counts.index[::step])))
    axes.tick_params(axis="y", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylabel="client", title=f"{label}: {clients} clients, {classes} classes")
    return figure


def _draw_bars(axes: Axes, counts: pd.DataFrame) -> None:
    from matplotlib import colormaps

    name = "tab10" if counts.shape[1] <= 10 else "tab20"
    colours = colormaps[name].colors  # type: ignore[attr-defined]
    left = [0] * len(counts)
    for number, column in enumerate(counts.columns):
        sizes = counts[column].tolist()
        axes.barh(
            range(len(counts)),
            sizes,
            left=left,
            color=colours[number],
            label=str(column),
            height=0.8,
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.set_xlabel("records")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Below the bars, since twenty names would be higher than the bars of few clients.
    figure.legend(
        loc="outside lower center", ncols=min(counts.shape[1], 10), frameon=False, fontsize=8,
        title="class", handlelength=1, columnspacing=1,
    )  # fmt: skip


def _draw_heat(axes: Axes, counts: pd.DataFrame) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    # A class that a client has none of is white: in a label-skewed split that is what matters.
    colours = colormaps["viridis_r"].with_extremes(bad="white")
    drawn = axes.pcolormesh(
        [number - 0.5 for number in range(counts.shape[1] + 1)],
        [number - 0.5 for number in range(len(counts) + 1)],
        counts.astype(float).where(counts > 0).to_numpy(),
        cmap=colours,
        norm=LogNorm(vmin=1, vmax=max(int(counts.to_numpy().max()), 2)),
    )
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(drawn, ax=axes, label="records (log scale; white: none)", pad=0.01)
    axes.set_xlabel("class, in sorted order from 0")


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
        axes.axvline((places[-2] + places[-1]) / 2, color="grey", linewidth=0.8, linestyle=":")


def _modes(plan: ComponentPlan, num_blocks: int) -> list[str]:
    """Return the factors that train in any step, for each block."""
    plan.check(num_blocks)
    steps = range(1, len(plan.steps) + 1)
    return [
        "".join(sorted({*"".join(plan.factors(step, block) for step in steps)}))
        for block in range(num_blocks)
    ]


def save(figure: Figure, path: Path) -> None:
    """Write a picture in one piece."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    replace_file(path, content.getvalue())
