"""The report to the user on a split: how many records are used or left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Reading:
    """Counts of the used and left-out records of a split.

    Parameters
    ----------
    split : str
        Name of the split.
    found : int
        Number of records in the split's files.
    columns : tuple[str, ...]
        Columns that the model reads.
    left_out : dict[str, int]
        Number of records that are not used, per reason. Each record counts once.
    notes : list[str]
        Sentences about data that the user may not have intended.
    """

    split: str
    found: int
    columns: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Number of records that are used."""
        return self.found - sum(self.left_out.values())

    def leave_out(self, reason: str, count: int) -> None:
        """Count records as left out."""
        if count > 0:
            self.left_out[reason] = count

    def leave_out_rows(self, lacking: Mapping[str, NDArray[np.int64]]) -> None:
        """Count records as left out, given the positions of the records with each defect."""
        known: set[int] = set()
        for what, rows in lacking.items():
            new = set(rows.tolist()) - known
            self.leave_out(f"with {what}", len(new))
            known |= new

    def lines(self) -> list[str]:
        """Return the report: one line with the counts, then one line per note."""
        columns = " and ".join(map(repr, self.columns))
        line = f"{self.split}: {self.used:,} of {self.found:,} records, read from {columns}"
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items()]
        if reasons:
            line += f"; left out: {', '.join(reasons)}"
        return [line, *(f"{self.split}: {note}" for note in self.notes)]


def empty_texts(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """Return a sentence for each text column that is empty in some records."""
    import pyarrow.compute as pc

    found = []
    for name in columns:
        if getattr(dataset.features[name], "dtype", "") in ("string", "large_string"):
            held = dataset.data.table.column(name)
            if dataset._indices is not None:
                held = held.take(dataset._indices.column(0))
            empty = pc.sum(pc.equal(pc.fill_null(held, ""), "")).as_py()
            if empty:
                found.append(f"records without text in {name!r}, read as an empty text: {empty:,}")
    return found
