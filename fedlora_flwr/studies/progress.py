"""How far a comparison is: which runs are done, at work and left, read from its folder."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedlora_flwr.files import write_json
from fedlora_flwr.operating_system import abandoned, host_sign
from fedlora_flwr.report.page import study_report
from fedlora_flwr.studies.compare_results import (
    KEY,
    LOCK,
    REPORT,
    ROWS,
    SETTINGS,
    Pair,
    Row,
    RowKey,
    read_rows,
    row_key,
    seconds_left,
)

if TYPE_CHECKING:
    from fedlora_flwr.studies.comparison import Job

PROGRESS, TABLE = "progress.json", "table.md"


def write_progress(
    folder: Path, workers: int, waiting: Sequence[Job], later: Sequence[Pair], total: int
) -> None:
    """Write which runs follow, for those who watch the folder.

    Parameters
    ----------
    folder : Path
        The comparison's folder.
    workers : int
        Runs at a time.
    waiting : Sequence[Job]
        The runs that begin now, in their order.
    later : Sequence[Pair]
        Row and ε of each run that follows them.
    total : int
        Runs of the comparison, those included that are done.
    """
    content = {
        "host": host_sign(),
        "workers": workers,
        "total": total,
        # ε is text, because JSON has no infinity.
        "waiting": [[str(value) for value in job.key] for job in waiting],
        "later": [[row, str(epsilon)] for row, epsilon in later],
    }
    write_json(folder / PROGRESS, content)


@dataclass(frozen=True)
class PairState:
    """How far a row is at one ε.

    Parameters
    ----------
    row : str
        Name of the row.
    epsilon : float
        The budget; infinity means no privacy.
    done, failed, running, left : int
        Its runs, those of tuning included. A failed run is not among those that are done.
    mean : float or None
        Mean of the final metric over the reported runs.
    """

    row: str
    epsilon: float
    done: int
    failed: int
    running: int
    left: int
    mean: float | None


class FollowedComparison:
    """What a comparison has done so far.

    Parameters
    ----------
    folder : Path
        The comparison's folder.

    Attributes
    ----------
    rows : list[Row]
        All finished runs; of a run that was tried again, the last try.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._told: set[tuple[RowKey, float]] = set()
        self._plan: dict[str, Any] = {}

    def new_rows(self) -> list[Row]:
        """Read what is new, and return the runs that have ended since the last call."""
        self._read_plan()
        found = [cast("Row", row) for row in read_rows(self.folder / ROWS).to_dict("records")]
        self.rows = list({_key(row): row for row in found}.values())
        new = [row for row in found if (_key(row), row["seconds"]) not in self._told]
        self._told.update((_key(row), row["seconds"]) for row in new)
        return new

    def _read_plan(self) -> None:
        file = self.folder / PROGRESS
        self._plan = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def total(self) -> int:
        """Runs of the comparison; those that are done, if it does not say more."""
        return max(int(self._plan.get("total", 0)), len(self.rows))

    @property
    def running(self) -> list[RowKey]:
        """The runs at work: workers take them in their order."""
        return self._waiting[: int(self._plan.get("workers", 0))]

    @property
    def _waiting(self) -> list[RowKey]:
        done = {_key(row) for row in self.rows}
        keys = [_read_key(texts) for texts in self._plan.get("waiting", ())]
        return [key for key in keys if key not in done]

    @property
    def seconds_left(self) -> float | None:
        """About how long the other runs take, from the time of those that are done."""
        if not self._plan:
            return None
        return seconds_left(self.rows, self.total - len(self.rows), int(self._plan["workers"]))

    def pairs(self) -> list[PairState]:
        """Return how far each row is at each ε, in the order in which they begin."""
        at_work = Counter(key[1:3] for key in self.running)
        left = Counter(key[1:3] for key in self._waiting) - at_work
        left += Counter((row, float(epsilon)) for row, epsilon in self._plan.get("later", ()))
        done = Counter(_pair(row) for row in self.rows if not row["error"])
        failed = Counter(_pair(row) for row in self.rows if row["error"])
        names = dict.fromkeys([*map(_pair, self.rows), *at_work, *left])
        return [
            PairState(
                row=row,
                epsilon=epsilon,
                done=done[row, epsilon],
                failed=failed[row, epsilon],
                running=at_work[row, epsilon],
                left=left[row, epsilon],
                mean=self._mean((row, epsilon)),
            )
            for row, epsilon in names
        ]

    def _mean(self, pair: Pair) -> float | None:
        finals = [
            row["final"]
            for row in self.rows
            if _pair(row) == pair and row["phase"] == REPORT and not row["error"]
        ]
        return statistics.fmean(finals) if finals else None

    def ending(self) -> str | None:
        """Return in words how the comparison has ended, or None while it goes on."""
        self._read_plan()
        table, progress = self.folder / TABLE, self.folder / PROGRESS
        began = progress.stat().st_mtime if progress.exists() else 0.0
        if table.exists() and table.stat().st_mtime >= began:
            return f"completed; the results are in {table}"
        files = (self.folder / name for name in (PROGRESS, ROWS, SETTINGS, "compare.log"))
        if abandoned(self.folder / LOCK, str(self._plan.get("host", "")), files):
            return "before its last run; the same command continues it"
        return None


def study_page(folder: Path, reload: int | None = None) -> str:
    """Return the report of a comparison as an HTML document.

    Parameters
    ----------
    folder : Path
        The comparison's folder.
    reload : int, optional
        Seconds after which a browser loads the page again.
    """
    rows = read_rows(folder / ROWS).to_dict("records")
    named = [{str(key): value for key, value in row.items()} for row in rows]
    return study_report(folder.resolve().name, named, reload)


def _pair(row: Row) -> Pair:
    return row["row"], float(row["epsilon"])


def _key(row: Row) -> RowKey:
    return _read_key([str(value) for value in row_key(row)])


def _read_key(texts: Sequence[str]) -> RowKey:
    """Read the values of `KEY`; the first two are names."""
    return (*texts[:2], *map(float, texts[2 : len(KEY)]))
