"""The modes of an audit, by name: each attacks a configuration and returns the record."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedlora_flwr.audit.one_run import attack_once, one_run_setting
from fedlora_flwr.audit.record import BLACK_BOX, ONE_RUN, PAIRED, AuditRecord
from fedlora_flwr.audit.trials import play, record_of, trials_setting
from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes.workers import Execute, one_by_one

__all__ = ["BLACK_BOX", "ONE_RUN", "PAIRED", "attack"]


def attack(
    config: RunConfig,
    mode: str,
    kind: str,
    records: int,
    runs: int,
    confidence: float,
    execute: Execute = one_by_one,
    on_runs: Callable[[int], object] = int,
) -> AuditRecord:
    """Attack what a configuration runs.

    Parameters
    ----------
    config : RunConfig
        The settings of each run (see `fedlora_flwr.audit.game.short`).
    mode : str
        `PAIRED`, `ONE_RUN` or `BLACK_BOX`.
    kind : str
        Kind of the canaries (see `fedlora_flwr.audit.canaries.KINDS`).
    records : int
        Records of each client. In one run all of them are canaries.
    runs : int
        Number of runs. `ONE_RUN` has one.
    confidence : float
        Of all bounds together.
    execute : Execute
        Where the runs take place.
    on_runs : callable, optional
        Called with the number of runs so far.

    Raises
    ------
    InvalidValue
        The task has no such canaries, clients have too few records, or there are too few runs.
    """
    started = time.perf_counter()
    if mode == ONE_RUN:
        found = attack_once(one_run_setting(config, records, kind), confidence)
    else:
        setting = trials_setting(config, records, kind, mode)
        played = play(setting, mode, runs, execute, on_runs)
        found = record_of(setting, mode, played, confidence)
    return found.timed(time.perf_counter() - started)
