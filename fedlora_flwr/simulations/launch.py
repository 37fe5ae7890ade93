"""One run on this machine, from its configuration to its folder, for commands and for Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.split_table import split_of_run
from fedlora_flwr.operating_system import WINDOWS
from fedlora_flwr.processes.workers import kept_log, log_to_file
from fedlora_flwr.server.checkpoint import Checkpoint
from fedlora_flwr.server.endings import recorded
from fedlora_flwr.server.given import check_alone
from fedlora_flwr.server.keeper import as_begun, read_checkpoint, resumable
from fedlora_flwr.server.rounds import OnRound
from fedlora_flwr.server.run_dir import RunDirectory, check_unused
from fedlora_flwr.server.trackers import trackers_of
from fedlora_flwr.simulations.runner import (
    PreparedRun,
    prepare_run,
    run_in_process,
    run_on_flower,
)

PROCESS, FLOWER = "process", "flower"
ENGINES = (PROCESS, FLOWER)
"""What may serve the clients: processes of this package, or Flower's simulation engine."""


@dataclass(frozen=True)
class OpenRun:
    """A run that is checked and has a folder, and has not begun.

    Parameters
    ----------
    prepared : PreparedRun
        The checked run.
    run_dir : RunDirectory
        Its folder.
    start : callable
        Runs it (see `run_in_process`).
    """

    prepared: PreparedRun
    run_dir: RunDirectory
    start: Callable[[PreparedRun, RunDirectory, OnRound], dict[str, Any]]

    def play(self, on_round: OnRound) -> dict[str, Any]:
        """Run it, and return the summary.

        Parameters
        ----------
        on_round : callable
            Called with each row of ``rounds.jsonl``.

        Raises
        ------
        FedLoRAError
            The run could not continue. Its folder says why.
        """
        config = self.prepared.config
        with kept_log(), recorded(self.run_dir, config):
            prepared = self.prepared
            said = [*prepared.records, *prepared.notes, *filter(None, [prepared.precision])]
            log_to_file(self.run_dir.log, said)
            self.run_dir.write_split(split_of_run(config))
            if config.resume:  # Before the rounds are followed.
                read_checkpoint(config, self.run_dir)
            return self.start(self.prepared, self.run_dir, on_round)


def open_run(
    config: RunConfig,
    output: Path,
    engine: str = PROCESS,
    workers: int | None = None,
    console: Console | None = None,
    on_resume: Callable[[Checkpoint, list[str]], object] | None = None,
) -> OpenRun:
    """Check a run, and open the folder to continue, the one that is named, or a new one.

    Parameters
    ----------
    config : RunConfig
        The run.
    output : Path
        Folder in which a new run's folder is made.
    engine : str (default: "process")
        One of `ENGINES`.
    workers : int, optional
        Processes that serve clients; by default this one, or Ray's for all cores.
    console : Console, optional
        Shows the progress of the checks if it is a terminal.
    on_resume : callable, optional
        Called before the checks of a run that continues, with its checkpoint and sentences on
        damaged ones.

    Raises
    ------
    InvalidValue
        A setting cannot be used, the folder is another run's, or an object would have to travel to
        another process.
    NotInstalled
        The package of a tracker is not installed.
    FedLoRAError
        The model cannot train (see `prepare_run`).
    """
    check_engine(config, engine, workers)
    if config.resume:
        config = as_begun(config)
        checkpoint, damaged = resumable(config)
        if on_resume:
            on_resume(checkpoint, damaged)
    elif config.run_dir:
        check_unused(Path(config.run_dir))
    trackers_of(config)  # What is wrong with them is told before any work.
    prepared = prepare_run(config, console)
    start = (
        partial(run_on_flower, workers=workers)
        if engine == FLOWER
        else partial(run_in_process, workers=workers or 1)
    )
    return OpenRun(prepared, _folder(config, output), start)


def check_engine(config: RunConfig, engine: str, workers: int | None) -> None:
    """Refuse an unknown engine, and objects of this process that other processes would need.

    Raises
    ------
    InvalidValue
        ``engine`` is unknown or does not run on this system, or an object cannot travel.
    """
    if engine not in ENGINES:
        raise InvalidValue("engine", engine, f"one of {list(ENGINES)}")
    if engine == FLOWER and WINDOWS:
        allowed = f"{PROCESS!r} on Windows, as in `fedlora simulate`: Ray needs Linux or macOS"
        raise InvalidValue("engine", engine, allowed)
    key, value = ("engine", engine) if engine == FLOWER else ("workers", workers)
    alone = engine == PROCESS and (workers or 1) == 1
    check_alone(config, key, value, alone=alone, serves=engine == PROCESS)


def _folder(config: RunConfig, output: Path) -> RunDirectory:
    if config.resume:
        return RunDirectory(Path(config.resume), resume=True)
    if config.run_dir:
        return RunDirectory(Path(config.run_dir))
    return RunDirectory.new(output.resolve(), config)
