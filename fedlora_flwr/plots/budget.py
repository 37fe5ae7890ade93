"""A picture of a budget: ε over the rounds at one noise, and noise over the rounds at one ε."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora_flwr.plots.figures import MODES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def budget_figure(
    curves: pd.DataFrame, rounds: int, epsilon: float, noise_multiplier: float, delta: float
) -> Figure:
    """Draw both curves, with a line at the budget, at the noise and at the planned rounds.

    Parameters
    ----------
    curves : pandas.DataFrame
        One row per point, with the columns ``rounds``, ``epsilon`` and ``noise_multiplier``.
    rounds : int
        The planned rounds T; with 0 nothing is marked.
    epsilon : float
        The budget, for which the curve of the noise holds.
    noise_multiplier : float
        σ, for which the curve of ε holds.
    delta : float
        δ, for the title.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, column, level, color, title in (
        (panels[0], "epsilon", epsilon, MODES["A"], f"ε at σ = {noise_multiplier:.4g}"),
        (panels[1], "noise_multiplier", noise_multiplier, MODES["B"], f"σ for ε = {epsilon:.4g}"),
    ):
        axes.plot(curves["rounds"], curves[column], color=color, marker=".", markersize=4)
        axes.axhline(level, color="gray", linewidth=0.8)
        if rounds:
            axes.axvline(rounds, color="gray", linewidth=0.8, linestyle=":")
        axes.set_title(f"{title}, δ = {delta:g}", fontsize=10)
        axes.set_ylabel("ε" if column == "epsilon" else "σ")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[1].set_xlabel("round")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure
