"""Writes a run's checkpoints, and reads the one that a run continues from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import AUTO
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.checkpoint import Checkpoint, Checkpoints
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory


class Keeper:
    """The checkpoints of the run that this process serves.

    Parameters
    ----------
    run_dir : RunDirectory
        Its folder.
    config : RunConfig
        The run.
    fingerprint : str
        Hash of the backbone.

    Attributes
    ----------
    run : str
        Identity under which the clients' ledgers know the run.
    """

    def __init__(self, run_dir: RunDirectory, config: RunConfig, fingerprint: str) -> None:
        self.run = ""
        self._run_dir, self._config, self._fingerprint = run_dir, config, fingerprint
        self._files = Checkpoints(run_dir.path)

    def keep(
        self,
        server_round: int,
        seconds: float,
        arrays: Arrays,
        strategy: Mapping[str, Any],
        average: Mapping[str, Any],
        opener: Mapping[str, Any],
        best: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of a round, whose rows have been written."""
        self._files.save(
            Checkpoint(
                round=server_round,
                run=self.run,
                config=self._config.items(),
                fingerprint=self._fingerprint,
                files=self._run_dir.durable_rows(),
                seconds=seconds,
                arrays=arrays,
                strategy=strategy,
                average=average,
                opener=opener,
                best=best,
            )
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another backbone."""
        if checkpoint.fingerprint != self._fingerprint:
            allowed = f"{checkpoint.fingerprint}, as when the run began. Put that model back"
            raise InvalidValue("backbone", self._fingerprint, allowed)


def as_begun(config: RunConfig) -> RunConfig:
    """Return the configuration with the precision that its run began with, if it is left open.

    Raises
    ------
    InvalidValue
        The folder has no checkpoint that is whole.
    """
    if config.precision != AUTO:
        return config
    checkpoint, _ = Checkpoints(Path(config.resume)).last()
    # A checkpoint without this key is of another version, which its check says.
    return replace(config, precision=str(checkpoint.config.get("precision", AUTO)))


def resumable(config: RunConfig) -> tuple[Checkpoint, list[str]]:
    """Return what a run continues from, and sentences on what is damaged; change nothing.

    Raises
    ------
    InvalidValue, ConfigurationChanged, OtherVersion
        The folder has no checkpoint that is whole, or it is of another configuration.
    """
    checkpoint, damaged = Checkpoints(Path(config.resume)).last()
    checkpoint.check(config)
    return checkpoint, damaged


def read_checkpoint(config: RunConfig, run_dir: RunDirectory) -> Checkpoint | None:
    """Return what a run continues from, and put its folder back to that state.

    A run whose ``run-dir`` is the same folder begins there again, if it ended before its first
    checkpoint: nothing has been asked of a client then. The result is ``None``.

    Raises
    ------
    InvalidValue, ConfigurationChanged, OtherVersion
        See `resumable`, or the files of rows are not those that the run has written.
    """
    begun = Checkpoints(run_dir.path).any() or len(run_dir.rounds()) > 1
    if config.resume == config.run_dir and not begun:
        run_dir.clear()
        return None
    checkpoint, damaged = resumable(config)
    for sentence in damaged:
        log(WARNING, "%s", sentence)
    run_dir.rewind(checkpoint.files)
    Checkpoints(run_dir.path).forget_after(checkpoint.round)
    return checkpoint


def rows_of(run_dir: RunDirectory, config: RunConfig) -> list[RoundRow]:
    """Return the rounds' rows with their infinities restored, which JSON cannot hold."""
    rows = run_dir.rounds()
    for row in rows[1:]:
        if not config.private and row["epsilon_max"] is None and row["clients_used"]:
            row["epsilon_max"] = math.inf
    return rows


def told_before(run_dir: RunDirectory) -> list[dict[str, Any]]:
    """Return the clients' rows, also with their infinities restored."""
    return [
        {word: math.inf if value is None else value for word, value in row.items()}
        for row in run_dir.rows("clients")
    ]
