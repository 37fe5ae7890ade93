"""A picture of how clients share the records of each class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plots.figures import save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# More colors cannot be told apart, so more classes get a heat map.
MAX_COLORS = 20
_LEGEND = 110  # Letters in one line of the legend.


def plot_split(counts: pd.DataFrame, path: Path, label: str) -> None:
    """Draw each client's records by class: bars, or a heat map above 20 classes.

    Parameters
    ----------
    counts : pandas.DataFrame
        Numbers of records: one row per client, the first at the top, and one column per class.
    path : Path
        The PNG file, written atomically.
    label : str
        What the records are, for the title.

    Raises
    ------
    InvalidValue
        There is no client or no class.
    """
    save(split_figure(counts, label), path)


def split_figure(counts: pd.DataFrame, label: str) -> Figure:
    """Make the picture of `plot_split`, from the same parameters."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    if not clients or not classes:
        raise InvalidValue("counts", f"{clients} clients, {classes} classes", "at least one each")
    height = min(1.6 + 0.22 * max(clients, 4), 14)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.add_subplot()
    (_draw_bars if classes <= MAX_COLORS else _draw_heat)(axes, counts)
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
    colors = colormaps[name].colors  # type: ignore[attr-defined]
    left = [0] * len(counts)
    for number, column in enumerate(counts.columns):
        sizes = counts[column].tolist()
        axes.barh(
            range(len(counts)),
            sizes,
            left=left,
            color=colors[number],
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
    fitting = max(1, _LEGEND // (max(len(str(name)) for name in counts.columns) + 4))
    columns = min(counts.shape[1], 10, fitting)
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
        title="class", handlelength=1, columnspacing=1,
    )  # fmt: skip


def _draw_heat(axes: Axes, counts: pd.DataFrame) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    # White marks classes of which a client has no record. They matter most in a label-skewed split.
    colors = colormaps["viridis_r"].with_extremes(bad="white")
    drawn = axes.pcolormesh(
        [number - 0.5 for number in range(counts.shape[1] + 1)],
        [number - 0.5 for number in range(len(counts) + 1)],
        counts.astype(float).where(counts > 0).to_numpy(),
        cmap=colors,
        norm=LogNorm(vmin=1, vmax=max(int(counts.to_numpy().max()), 2)),
    )
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(drawn, ax=axes, label="records (log scale; white: none)", pad=0.01)
    axes.set_xlabel("class, in sorted order from 0")
