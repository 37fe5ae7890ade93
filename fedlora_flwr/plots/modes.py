"""A picture of which factor each block trained in each round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.plots.figures import MODES, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MODE_NAMES = {"A": "A", "B": "B", "AB": "A and B", "": "neither"}


def plot_modes(plans: Sequence[str], blocks: Sequence[str], path: Path, run: str = "") -> None:
    """Draw which factor each block trained in each round, the first block at the top.

    Parameters
    ----------
    plans : Sequence[str]
        The rounds' plans, as `fedlora_flwr.plan.ComponentPlan` writes them. A block that trains A
        at one step and B at another counts as both.
    blocks : Sequence[str]
        Names of the blocks, in model order.
    path : Path
        The PNG file, written atomically.
    run : str (default: "")
        A name of the run, for the title.

    Raises
    ------
    InvalidValue
        There is no round or no block, or a plan is for another number of blocks.
    """
    save(modes_figure(plans, blocks, run), path)


def modes_figure(plans: Sequence[str], blocks: Sequence[str], run: str = "") -> Figure:
    """Make the picture of `plot_modes`, from the same parameters."""
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
    axes.set(xlabel="round", ylabel="block", title=_title(run))
    there = {mode for column in columns for mode in column}
    shown = [Patch(color=MODES[name], label=MODE_NAMES[name]) for name in names if name in there]
    figure.legend(handles=shown, loc="outside right upper", frameon=False)
    return figure


def _title(run: str) -> str:
    return "Factors that each block trained" + (f"\n{run}" if run else "")


def _modes(plan: ComponentPlan, num_blocks: int) -> list[str]:
    """Return the factors that train in any step, for each block."""
    plan.check(num_blocks)
    return [plan.factors_of_round(block) for block in range(num_blocks)]
