"""Record in a run's folder how the run ended, even if it crashed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.files import to_json
from fedlora_flwr.processes.lifeline import Lifeline
from fedlora_flwr.server.report import try_report
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.terminal import uninterrupted

COMPLETED, FAILED, INTERRUPTED = "completed", "failed", "interrupted"
UNTOLD = "The process ended without recording a reason. It was probably killed."
"""Error of a summary that another process had to write."""


def status_of(error: BaseException) -> str:
    """Return whether a run was stopped from outside or failed, as a summary's status."""
    # Flower ends a ServerApp that is stopped by SystemExit.
    return INTERRUPTED if isinstance(error, KeyboardInterrupt | SystemExit) else FAILED


def reason_of(error: BaseException) -> str:
    """Return the text that a summary keeps of an error."""
    return f"{type(error).__name__}: {error}"


def untold(summary: Mapping[str, Any] | None) -> bool:
    """Return whether the run itself has not recorded how it ended."""
    return summary is None or summary.get("error") == UNTOLD


@contextmanager
def recorded(run_dir: RunDirectory, config: RunConfig) -> Iterator[None]:
    """Take a run's folder, and ensure that it holds a summary when the run has ended.

    A run writes its own summary (see `fedlora_flwr.server.serve`). If it could not, this process
    writes a shorter one. If this process is killed as well, another process writes it.

    Parameters
    ----------
    run_dir : RunDirectory
        The folder.
    config : RunConfig
        The run.

    Raises
    ------
    InvalidValue
        The folder is another run's.
    """
    run_dir.take()
    with Lifeline() as lifeline:
        last_words = to_json(_short_summary(config, INTERRUPTED, UNTOLD), indent=2) + "\n"
        lifeline.start(last_words=(run_dir.summary_file, last_words))
        try:
            yield
        except BaseException as error:
            with uninterrupted(), suppress(OSError):  # The first error is the one to show.
                if untold(run_dir.summary()):
                    short = _short_summary(config, status_of(error), reason_of(error))
                    run_dir.write_summary({**short, **_progress(run_dir.rounds())})
                    try_report(run_dir)
            raise


def _short_summary(config: RunConfig, status: str, error: str) -> dict[str, Any]:
    return {
        "status": status,
        "error": error,
        "task": config.task,
        "strategy": config.strategy,
        "num_rounds": config.num_rounds,
        "epsilon_budget": config.epsilon if math.isfinite(config.epsilon) else None,
        "delta": config.delta,
        "seed": config.seed,
    }


def _progress(rows: list[RoundRow]) -> dict[str, Any]:
    spent = [spent for row in rows if (spent := row.get("epsilon_max")) is not None]
    return {"rounds_done": max(len(rows) - 1, 0), "epsilon_max": max(spent, default=None)}
