"""Measures how long the rounds of a run take."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import PreparedRun, run_in_process


def time_rounds(
    prepared: PreparedRun,
    run_dir: RunDirectory,
    between: Callable[[], object] = lambda: None,
    workers: int = 1,
    started: Callable[[], object] = lambda: None,
) -> list[float]:
    """Run without Ray and return the seconds of each round but the first.

    The first builds the clients' model.

    Parameters
    ----------
    prepared, run_dir, workers
        As for `run_in_process`.
    between : callable, optional
        Called after each round, outside of its time, for measurements that take turns with rounds.
    started : callable, optional
        Called before the first round.
    """
    seconds: list[float] = []
    mark = time.perf_counter()

    def after(row: RoundRow) -> None:
        nonlocal mark
        if row["round"] > 1:
            seconds.append(time.perf_counter() - mark)
        # The first row is that of the start, before any round.
        between() if row["round"] else started()
        mark = time.perf_counter()

    run_in_process(prepared, run_dir, after, workers)
    return seconds
