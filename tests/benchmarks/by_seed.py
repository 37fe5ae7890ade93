"""Differences between two rows of a comparison, from the committed runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from benchmarks.pictures import runs_of


class Cell(NamedTuple):
    """A row of the comparison in some files, at one ε."""

    files: tuple[str, ...]
    row: str
    epsilon: float

    def finals(self) -> pd.Series[float]:
        """Return the accuracy after the last round, from 0 to 1, by seed."""
        runs = runs_of(*self.files)
        here = runs[(runs["row"] == self.row) & (runs["epsilon"] == self.epsilon)]
        return here.set_index("seed")["final"]


def stated_gap(one: Cell, other: Cell, seeds: int) -> str:
    """Return ``one`` minus ``other`` by seed in points as pages state it: mean ± standard error."""
    gaps = 100 * (one.finals() - other.finals())
    assert sorted(gaps.index) == list(range(1, seeds + 1))
    return f"{gaps.mean():.1f} ± {gaps.std() / math.sqrt(seeds):.1f}"
