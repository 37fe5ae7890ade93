"""Pictures of what `benchmarks.mechanisms` has measured. `benchmarks.pictures` draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from benchmarks.mechanism_page import RESULTS, read
from fedlora_flwr.plots.figures import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mechanism_pictures(folder: Path) -> Iterator[Path]:
    """Draw all of them into a folder."""
    found = read(RESULTS)
    for name, (part, draw) in DRAWN.items():
        save(draw(found[part]), folder / name)
        yield folder / name


def noise_figure(rows: pd.DataFrame) -> Figure:
    """Draw the noise in the product after one and two rounds: formulas as bars, samples as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    starts = list(dict.fromkeys(rows["start"]))
    panels = figure.subplots(1, len(starts), sharey=True)
    for axes, start in zip(panels, starts, strict=True):
        own = rows[rows["start"] == start]
        methods = list(dict.fromkeys(own["method"]))
        for number, (rounds, each) in enumerate(own.groupby("rounds")):
            places = [place + 0.4 * (number - 0.5) for place in range(len(methods))]
            label = f"{rounds} round{'s' if number else ''}, formula"
            axes.bar(places, each["formula"], width=0.36, alpha=0.6, label=label)
            axes.errorbar(
                places, each["sampled"], yerr=2 * each["error"], fmt="k.", markersize=5,
                capsize=2, label="sampled, ± 2 standard errors" if number else None,
            )  # fmt: skip
        axes.set_xticks(range(len(methods)), labels=methods, rotation=35, ha="right", fontsize=8)
        axes.set_title(start, fontsize=10)
        axes.set_yscale("log")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("squared norm of the noise in B A")
    panels[0].legend(fontsize=7.5)
    return figure


def reconstruction_figure(rows: pd.DataFrame) -> Figure:
    """Draw the error of reconstruction by round, mean over the seeds, a panel per noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    noises = list(dict.fromkeys(rows["noise"]))
    panels = figure.subplots(1, len(noises), sharey=True)
    for axes, noise in zip(panels, noises, strict=True):
        for schedule, own in rows[rows["noise"] == noise].groupby("schedule", sort=False):
            mean = own.groupby("round")["error"].mean()
            axes.plot(mean.index, mean, label=str(schedule), linewidth=1.4)
        axes.set_title(
            "no noise" if noise == 0 else f"noise of {noise:g} per coordinate", fontsize=10
        )
        axes.set(xlabel="round", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of B A")
    panels[0].legend(fontsize=7.5)
    return figure


def sharpness_figure(rows: pd.DataFrame) -> Figure:
    """Draw each run's largest eigenvalue in the weights and in the factors against its loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    curved = rows.dropna(subset=["top_weights"])
    panels = figure.subplots(1, 2)
    for axes, (column, title) in zip(
        panels,
        {"top_weights": "the adapted weights", "top_factors": "A and B"}.items(),
        strict=True,
    ):
        for marker, (name, own) in zip("osD^vP", curved.groupby("row", sort=False), strict=True):
            axes.plot(own["loss"], own[column], marker, label=str(name), markersize=5, alpha=0.8)
        axes.set_title(f"in the coordinates of {title}", fontsize=10)
        axes.set(xlabel="loss on the public records", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("largest eigenvalue of the Hessian")
    panels[1].legend(fontsize=7.5)
    return figure


DRAWN: Mapping[str, tuple[str, Callable[[pd.DataFrame], Figure]]] = {
    "mechanisms-noise.png": ("noise", noise_figure),
    "mechanisms-reconstruction.png": ("reconstruction", reconstruction_figure),
    "mechanisms-sharpness.png": ("runs", sharpness_figure),
}
"""For each picture, its rows and what draws it."""
