"""What a tracker is, and what it is told of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import Value

COMPLETED = "completed"
TEXTS = ("status", "end", "task", "strategy", "metric", "accountant", "trust_model")
"""Texts of a summary that trackers of this package write. Errors and names stay in the folder."""
_PER_CLIENT = "suspects"
_NOT_WRITTEN = ("run-dir", "state-dir", "resume", "peers", "trackers")


@dataclass(frozen=True)
class TrackedRun:
    """A run that begins, or that continues.

    Parameters
    ----------
    name : str
        Name of the run's folder.
    folder : Path
        The run's folder, absolute.
    config : Mapping[str, Value]
        The configuration by short name, without folders of the machine (see `written_config`).
    rows : Sequence[Mapping[str, Any]]
        Rows of the rounds that are done. There are none unless the run continues.
    """

    name: str
    folder: Path
    config: Mapping[str, Value]
    rows: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> int:
        """The last round that is done; -1 if none is, as round 0 is before training."""
        return int(self.rows[-1]["round"]) if self.rows else -1


@runtime_checkable
class Tracker(Protocol):
    """Records a run somewhere else. The server alone calls it, in its own process.

    An error of a tracker does not end the run. The tracker gets no more rounds then, but it is
    still told the end.
    """

    def on_start(self, run: TrackedRun) -> None:
        """Begin to record a run, or continue with one.

        A run that continues has ``rows``. After a kill the tracker may have recorded less or, if
        a checkpoint was damaged, more than these.
        """

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Record a round, after its checkpoint: the row of ``rounds.jsonl``."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Record how the run has ended: ``summary.json``, also of a run that failed.

        A process that is killed cannot call it.
        """


def figures(told: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row or a summary by name, as trackers of this package write them.

    A nested number gets both names, such as ``agreement/B``. A list of texts becomes their count,
    since texts name clients. Other texts and missing values are left out.

    Parameters
    ----------
    told : Mapping[str, Any]
        A row of ``rounds.jsonl`` or a summary.

    Examples
    --------
    >>> figures({"round": 1, "accuracy": 0.5, "agreement": {"B": 0.25}, "failures": ["a: late"]})
    {'round': 1.0, 'accuracy': 0.5, 'agreement/B': 0.25, 'failures': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in told.items():
        if name == _PER_CLIENT:
            found[name] = float(len(value))
        elif isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in figures(value).items()}
        elif isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
            found[name] = float(len(value))
        elif isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def texts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a summary that trackers of this package write."""
    return {name: str(summary[name]) for name in TEXTS if summary.get(name)}


def written_config(config: RunConfig) -> dict[str, Value]:
    """Return what trackers are told of a configuration: of an absolute path, its last part."""
    return {
        key: f"…/{PurePath(value).name}"
        if isinstance(value, str) and PurePath(value).is_absolute()
        else value
        for key, value in config.items().items()
        if key not in _NOT_WRITTEN
    }
