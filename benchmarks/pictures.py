"""``python -m benchmarks.pictures``: draw docs/results/ from the rows in benchmarks/results/."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from benchmarks import ROOT
from benchmarks.mechanism_pictures import mechanism_pictures
from fedlora_flwr.places import STRATEGIES
from fedlora_flwr.plots.accuracy import plot_accuracy
from fedlora_flwr.plots.figures import run_name
from fedlora_flwr.plots.modes import plot_modes
from fedlora_flwr.studies.compare_results import read_rows

ROWS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
OF = {
    "accuracy.png": ("Handwritten digits", "digits/rows.csv", "digits/head-only.csv"),
    "cifar10.png": ("CIFAR-10, small Swin", "cifar10-small-swin/rows.csv"),
    "sst2.png": ("SST-2, MiniLM", "sst2-minilm/rows.csv"),
    "sst2-methods.png": ("SST-2, MiniLM, small runs", "sst2-minilm/all-methods.csv"),
    "cifar10-0.5.png": ("CIFAR-10, Dirichlet 0.5", "cifar10-small-swin/dirichlet-0.5.csv"),
    "cifar10-0.1.png": ("CIFAR-10, Dirichlet 0.1", "cifar10-small-swin/dirichlet-0.1.csv"),
    "skills.png": ("Instruction task, tiny LLaMA", "skills/rows.csv"),
    "secure-sum.png": ("Handwritten digits, secure sum", "secure-sum/digits.csv"),
    "secure-sum-sst2.png": ("SST-2, both trust models", "secure-sum/sst2.csv"),
    "secure-sum-sst2-methods.png": (
        "SST-2, small runs, secure sum",
        "secure-sum/sst2-all-methods.csv",
    ),
    "secure-sum-cifar10.png": ("CIFAR-10, both trust models", "secure-sum/cifar10.csv"),
    "secure-sum-cifar10-0.5.png": (
        "CIFAR-10, Dirichlet 0.5, secure sum",
        "secure-sum/cifar10-dirichlet-0.5.csv",
    ),
    "secure-sum-cifar10-0.1.png": (
        "CIFAR-10, Dirichlet 0.1, secure sum",
        "secure-sum/cifar10-dirichlet-0.1.csv",
    ),
    "secure-sum-skills.png": ("Instruction task, secure sum", "secure-sum/skills.csv"),
}
"""Comparisons to draw: the name of each one's data, and the files of its rows."""
METRICS = {"skills.png": "exact_match", "secure-sum-skills.png": "exact_match"}
"""The figure of a comparison, where it is not the accuracy."""
MODES = "modes.png"


def runs_of(*files: str) -> pd.DataFrame:
    """Return the reported runs of a comparison in the form that `plot_accuracy` takes.

    Methods have the same order everywhere, and so the same color in all pictures. Rows with other
    names keep theirs. Variants of a method (``METHOD, KEY VALUE``) are left to the page's text.
    """
    found = []
    for file in files:
        rows = read_rows(ROWS / file)
        # In rows of an earlier version, the strategy is the whole name.
        found.append(rows.rename(columns={"strategy": "row"}) if "row" not in rows else rows)
    every = pd.concat(found, ignore_index=True)
    variant = every["row"].str.partition(",")[0].isin(STRATEGIES) & ~every["row"].isin(STRATEGIES)
    runs = every[(every["phase"] == "report") & (every["error"] == "") & ~variant]
    order = {name: number for number, name in enumerate(STRATEGIES)}
    return runs.sort_values("row", key=lambda names: names.map(order), kind="stable")


def pictures(folder: Path) -> Iterator[Path]:
    """Draw all pictures into a folder."""
    for name, (data, *files) in OF.items():
        plot_accuracy(runs_of(*files), folder / name, METRICS.get(name, "accuracy"), data)
        yield folder / name
    one = json.loads((ROWS / "digits" / "as-lora-choices.json").read_text(encoding="utf-8"))
    title = run_name(*(one[key] for key in ("task", "strategy", "epsilon", "seed")))
    plot_modes(one["plans"], one["blocks"], folder / MODES, title)
    yield folder / MODES
    yield from mechanism_pictures(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures of docs/results.md and docs/mechanisms.md again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder to draw into")
    for path in pictures(parser.parse_args(argv).output):
        print(path)


if __name__ == "__main__":
    main()
