"""What is read of a split, what is left out, and why: the sentences that a user sees of it."""

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
    """An account of a split's records.

    Parameters
    ----------
    split : str
        Its name.
    found : int
        Records in its files.
    columns : tuple[str, ...]
        Columns that the model reads.
    left_out : dict[str, int]
        How many records are not used, by the reason. No record counts twice.
    notes : list[str]
        Sentences on what may not be what is meant.
    """

    split: str
    found: int
    columns: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Records that are used."""
        return self.found - sum(self.left_out.values())

    def leave_out(self, reason: str, count: int) -> None:
        """Count records as left out."""
        if count > 0:
            self.left_out[reason] = count

    def leave_out_rows(self, lacking: Mapping[str, NDArray[np.int64]]) -> None:
        """Count records as left out by the positions of those that lack something."""
        known: set[int] = set()
        for what, rows in lacking.items():
            new = set(rows.tolist()) - known
            self.leave_out(f"with {what}", len(new))
            known |= new

    def lines(self) -> list[str]:
        """Return the account in words, the first line for the records and one for each note."""
        columns = " and ".join(map(repr, self.columns))
        line = f"{self.split}: {self.used:,} of {self.found:,} records, read from {columns}"
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items()]
        if reasons:
            line += f"; left out: {', '.join(reasons)}"
        return [line, *(f"{self.split}: {note}" for note in self.notes)]


def empty_texts(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """Return a sentence for each column of texts that some records have nothing in."""
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
