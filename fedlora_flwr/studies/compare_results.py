"""The results of a comparison: its rows, the file that keeps them, and their summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypedDict, cast

import pandas as pd
from filelock import FileLock, Timeout

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import append, private_folder, replace_file
from fedlora_flwr.operating_system import READERS
from fedlora_flwr.studies.compare_methods import RATES

SETTINGS, ROWS, LOCK = "settings.json", "rows.csv", ".lock"
TUNE, REPORT, CONTROL = "tune", "report", "control"
"""Phases of a comparison: rates are tuned, results reported, and repeated without noise."""
KEY = ("phase", "row", "epsilon", "seed", *RATES)
COUNTS = ("bytes_up", "bytes_down", "failures")
Row = TypedDict(
    "Row",
    {
        "phase": str,
        "row": str,
        "epsilon": float,
        "seed": int,
        "lr-a": float,
        "lr-b": float,
        "lr-head": float,
        "strategy": str,
        "initial": float,
        "final": float,
        "epsilon_max": float,
        "bytes_up": int,
        "bytes_down": int,
        "seconds": float,
        "failures": int,
        "error": str,
        "own_labels": float,
    },
    total=False,
)
"""One run of a comparison. A failed run has no figures, and its ``error`` says why.

``own_labels`` is the last round's accuracy of clients' own models on their own labels (see
`fedlora_flwr.clients.own_labels.on_own_labels`), where clients have models of their own.
"""

COLUMNS = tuple(Row.__annotations__)
Rates = tuple[float, float, float]
Pair = tuple[str, float]
RowKey = tuple[Any, ...]


class Journal:
    """``rows.csv``: every finished run, written as soon as it ends.

    From the file of an earlier call, failed runs are removed, so that they are tried again, and so
    is a row that was cut off.

    Parameters
    ----------
    path : Path
        The file; made if missing.

    Attributes
    ----------
    rows : dict
        Rows by the values of `KEY`.
    """

    def __init__(self, path: Path) -> None:
        frame = read_rows(path)
        kept = frame[frame["error"] == ""].astype(dict.fromkeys(COUNTS, int))
        kept = kept.reindex(columns=list(COLUMNS))  # An earlier version may have had fewer.
        replace_file(path, kept.to_csv(index=False).encode())
        self._path = path
        self.rows: dict[RowKey, Row] = {}
        for record in kept.to_dict("records"):
            self.rows[row_key(record)] = cast(Row, record)

    def append(self, row: Row) -> None:
        """Keep a finished run."""
        line = pd.DataFrame([row], columns=list(COLUMNS)).to_csv(index=False, header=False)
        append(self._path, line.encode())
        self.rows[row_key(row)] = row


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose rows would mix with those of other settings.

    Raises
    ------
    InvalidValue
        The folder's ``settings.json`` differs.
    """
    path = folder / SETTINGS
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    keys = sorted(k for k in {*there, *settings} if there.get(k) != settings.get(k))
    if keys:
        texts = (f"{key} = {there.get(key)!r} (now {settings.get(key)!r})" for key in keys)
        raise InvalidValue(
            "output", str(folder), f"another folder, or its settings: {', '.join(texts)}"
        )


@contextmanager
def claim(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Reserve a folder for one comparison and one process at a time.

    Raises
    ------
    InvalidValue
        See `check_settings`.
    FedLoRAError
        Another process works in the folder.
    """
    private_folder(folder)
    try:
        with FileLock(folder / LOCK, timeout=READERS):
            check_settings(folder, settings)
            replace_file(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
            yield
    except Timeout:
        raise FedLoRAError(f"Another process compares in {folder}.") from None


def row_key(row: Mapping[Any, Any]) -> RowKey:
    """Return the values of `KEY`, which differ between any two runs of a comparison."""
    return tuple(row[name] for name in KEY)


def read_rows(path: Path) -> pd.DataFrame:
    """Read the complete lines of ``rows.csv``. An infinite ε means no privacy."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if not complete:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.read_csv(StringIO(complete), float_precision="round_trip", dtype={"error": str})
    return frame.fillna({"error": ""})


def summarize(rows: Sequence[Row], chosen: Mapping[Pair, Rates | None], seeds: int) -> pd.DataFrame:
    """Summarize the reported runs of each row and ε.

    Parameters
    ----------
    rows : Sequence[Row]
        The reported runs, failed ones included.
    chosen : Mapping[Pair, Rates | None]
        The learning rates of every pair; None if every trial failed.
    seeds : int
        Runs that each pair should have.

    Returns
    -------
    pandas.DataFrame
        One row per pair in the order of ``chosen``: ``row``, ``epsilon``, ``mean`` and ``std``
        (sample standard deviation, NaN for one run) of the final round's metric, ``failed``,
        ``bytes_up`` and ``bytes_down`` (means), ``own_mean`` and ``own_std`` of the accuracy on own
        labels (NaN where clients have no models of their own), and the rates.
    """
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    good = frame[frame["error"] == ""].astype({"final": float, "own_labels": float})
    groups = good.groupby(["row", "epsilon"])
    found = groups["final"].agg(["mean", "std", "count"])
    found[["own_mean", "own_std"]] = groups["own_labels"].agg(["mean", "std"])
    found = found.join(groups[["bytes_up", "bytes_down"]].mean())
    index = pd.MultiIndex.from_tuples(list(chosen), names=["row", "epsilon"])
    summary = found.reindex(index)
    summary["failed"] = (seeds - summary.pop("count").fillna(0)).astype(int)
    nothing = (math.nan,) * len(RATES)
    summary[list(RATES)] = [rates or nothing for rates in chosen.values()]
    return summary.reset_index()


def seconds_left(rows: Sequence[Row], runs: int, workers: int) -> float | None:
    """Return about how long more runs take, from the time of those that have finished.

    Parameters
    ----------
    rows : Sequence[Row]
        Finished runs. Failed ones tell nothing, as they may have ended early.
    runs : int
        How many runs follow.
    workers : int
        Runs at a time.

    Returns
    -------
    float or None
        Seconds; None if no run tells.
    """
    took = [row["seconds"] for row in rows if not row["error"]]
    return sum(took) / len(took) * runs / workers if took else None


def budget_name(epsilon: float) -> str:
    """Name an ε in the form that the command accepts."""
    return "none" if math.isinf(epsilon) else f"{epsilon:g}"


def describe_row(row: Row) -> str:
    """Return the result of one run in one line."""
    what = f"{row['phase']} {row['row']} ε {budget_name(row['epsilon'])}"
    how = (
        f"{row['lr-a']:g} / {row['lr-b']:g} / {row['lr-head']:g}"
        if row["phase"] == TUNE
        else f"seed {row['seed']}"
    )
    result = "failed" if row["error"] else f"{row['final']:.1%}"
    return f"{what}, {how}: {result} in {row['seconds']:.0f} s"


def data_name(config: RunConfig) -> str:
    """Name the task of a comparison, and the trust model if it is not the default."""
    return f"{config.task}, secure sum simulated" if config.secure_sum else config.task
