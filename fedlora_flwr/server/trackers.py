"""The trackers of a run: made before it, and told of its start, its rounds and its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import WARNING
from typing import Any

from flwr.common.logger import log

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.files import to_json
from fedlora_flwr.places import TRACKERS, load_tracker, tracker_names
from fedlora_flwr.server.rounds import OnRound, RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.tracking.tracker import TrackedRun, Tracker, written_config


def trackers_of(config: RunConfig) -> dict[str, Tracker]:
    """Make the trackers that a configuration names, by name.

    Only a server calls this. A device never loads a tracker.

    Raises
    ------
    InvalidValue
        A name stands for no tracker.
    NotInstalled
        The package of a tracker is not installed.
    """
    names = tracker_names(config.trackers)
    require(*(name for name in names if name in TRACKERS))
    return {name: _made(name) for name in names}


def _made(name: str) -> Tracker:
    found = load_tracker(name)
    made = found() if isinstance(found, type) else found
    if not isinstance(made, Tracker):
        kind = type(made).__name__
        allowed = f"a tracker, which has on_start, on_round and on_end; {kind} lacks one of them"
        raise InvalidValue("trackers", name, allowed)
    return made


class Trackers:
    """Tells a caller and all trackers of a run of its rounds.

    An error of the caller ends the run. An error of a tracker does not: it is logged, and the
    tracker gets no more rounds.

    Parameters
    ----------
    working : dict[str, Tracker]
        The trackers by name.
    on_round : callable, optional
        The caller's own.

    Attributes
    ----------
    remarks : dict[str, str]
        A sentence on each tracker that failed.
    """

    def __init__(self, working: dict[str, Tracker], on_round: OnRound | None) -> None:
        self._begun: dict[str, Tracker] = working
        self._on_round = on_round
        self.remarks: dict[str, str] = {}

    def on_start(self, run: TrackedRun) -> None:
        """Tell the trackers that a run begins or continues."""
        self._tell(lambda tracker: tracker.on_start(run), "at the start")
        self._begun = {n: t for n, t in self._begun.items() if _remark(n) not in self.remarks}

    def on_round(self, row: RoundRow) -> None:
        """Tell the caller and the trackers of a round."""
        written: dict[str, Any] = json.loads(to_json(row))  # As rounds.jsonl has it.
        self._tell(lambda tracker: tracker.on_round(written), f"in round {row['round']}")
        if self._on_round is not None:
            self._on_round(row)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Tell the trackers how the run has ended, also those that failed in a round."""
        self._tell(lambda tracker: tracker.on_end(summary), "at the end", again=True)

    def _tell(self, tell: Callable[[Tracker], None], when: str, *, again: bool = False) -> None:
        for name, tracker in self._begun.items():
            if _remark(name) in self.remarks and not again:
                continue
            try:
                tell(tracker)
            except Exception as error:  # A run must not depend on who looks at it.
                sentence = f"failed {when} and was told of no later round; run.log says why"
                self.remarks.setdefault(_remark(name), sentence)
                log(WARNING, "The tracker %s failed %s. The run continues.", name, when,
                    exc_info=error)  # fmt: skip


def _remark(name: str) -> str:
    return f"tracker {name}"


@contextmanager
def tracked(
    working: dict[str, Tracker], config: RunConfig, run_dir: RunDirectory, on_round: OnRound | None
) -> Iterator[Trackers]:
    """Start trackers on a run, and tell them its summary when the block ends in any way.

    Parameters
    ----------
    working : dict[str, Tracker]
        See `trackers_of`.
    config : RunConfig
        The run.
    run_dir : RunDirectory
        Its folder, which holds the rounds that are done. The block writes the summary.
    on_round : callable, optional
        Called with each row as well.
    """
    trackers, folder = Trackers(working, on_round), run_dir.path.resolve()
    rows = [dict(row) for row in run_dir.rounds()]
    trackers.on_start(TrackedRun(folder.name, folder, written_config(config), rows))
    try:
        yield trackers
    finally:
        if (summary := run_dir.summary()) is not None:
            trackers.on_end(summary)
