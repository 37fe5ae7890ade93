"""``fedlora_flwr.audit_run``: the attack of ``fedlora audit`` in one call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.audit import modes
from fedlora_flwr.audit.attached import attach, check_attachable
from fedlora_flwr.audit.canaries import default_kind
from fedlora_flwr.audit.game import short
from fedlora_flwr.audit.record import AuditRecord
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.followed import AUDIT, followed
from fedlora_flwr.config.names import key_named
from fedlora_flwr.config.recipes import config_of
from fedlora_flwr.config.unit import USER
from fedlora_flwr.errors import InvalidValue, NotInstalled, require
from fedlora_flwr.files import write_json
from fedlora_flwr.forecast.precision import settled
from fedlora_flwr.processes.lifeline import scratch
from fedlora_flwr.processes.workers import executor, kept_log
from fedlora_flwr.server.given import check_alone, given
from fedlora_flwr.tasks.registry import build_task, extras_of
from fedlora_flwr.terminal import counted

if TYPE_CHECKING:
    from fedlora_flwr.strategies.base import FedLoRA
    from fedlora_flwr.tasks.registry import Task, TaskFactory

MODES = (modes.PAIRED, modes.ONE_RUN, modes.BLACK_BOX)
_TRIALS, _ONE_RUN = 8, 100
"""Records of each client by default: in many short runs, and in one run."""


def audit_run(
    recipe: str | Path | RunConfig = "digits",
    *,
    mode: str = modes.PAIRED,
    canary: str = "",
    runs: int = 300,
    records: int = 0,
    confidence: float = 0.95,
    workers: int = 1,
    output: str | Path | None = None,
    attach_to: str | Path | None = None,
    task: str | Task | TaskFactory | None = None,
    strategy: str | type[FedLoRA] | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> AuditRecord:
    """Attack what a recipe runs, and bound ε from below, as ``fedlora audit`` does.

    Parameters
    ----------
    recipe, task, strategy, progress, **changes
        As for `fedlora_flwr.simulate`. A key that is given replaces that of a short run.
    mode : str (default: "paired")
        ``"paired"``, ``"one-run"`` or ``"black-box"``.
    canary : str (default: chosen by the mode)
        ``"gradient"``, ``"scaled"``, ``"label"`` or ``"tokens"``.
    runs : int (default: 300)
        Short runs to attack.
    records : int (default: 8, or 100 in one run)
        Records of each client.
    confidence : float (default: 0.95)
        Of all bounds together.
    workers : int (default: 1)
        Processes that attack.
    output : str or Path, optional
        JSON file of the record; the picture is beside it.
    attach_to : str or Path, optional
        Folder of a run that gets the record, and its card too.

    Returns
    -------
    AuditRecord
        What was attacked, what was claimed and what was found.

    Raises
    ------
    InvalidValue
        A setting cannot be used, the task has no such canaries, or there are too few runs.

    Examples
    --------
    >>> found = audit_run(
    ...     "digits", mode="one-run", records=20, num_clients=2, num_rounds=1, confidence=0.9999
    ... )
    >>> found.mode, found.counts.present + found.counts.absent, found.verdict != "violated"
    ('one run', 40, True)
    """
    mode = mode.replace("-", " ")
    if mode not in MODES:
        raise InvalidValue("mode", mode, f"one of {[name.replace(' ', '-') for name in MODES]}")
    once, file = mode == modes.ONE_RUN, None if output is None else Path(output)
    if file is not None and file.is_dir():
        raise InvalidValue("output", str(file), "a file")
    with ExitStack() as stack:
        changes |= given(stack, task=task, strategy=strategy)
        config = config_of(recipe, changes)
        require(*extras_of(config.task), "flwr_datasets")
        check_alone(config, "workers", workers, alone=workers == 1)
        count = records or (_ONE_RUN if once else _TRIALS)
        kind = canary or default_kind(config.task, black_box=mode == modes.BLACK_BOX)
        _check_unit(config)
        config, attacked = _short(config, changes, count, once=once)
        if attach_to:
            check_attachable(attacked.items(), Path(attach_to))
        log = file or stack.enter_context(scratch()) / "audit"
        stack.enter_context(kept_log())
        execute = stack.enter_context(executor(workers, log.with_suffix(".log")))
        tell = stack.enter_context(counted("run", progress))
        found = modes.attack(
            attacked, mode, kind, count, runs, confidence, execute, lambda n: tell(n, runs, "")
        )
    found = replace(found, recipe=_other_values(config, attacked))
    _write(found, file, Path(attach_to) if attach_to else None)
    return found


def _check_unit(config: RunConfig) -> None:
    """Refuse a promise for users: the canaries are records."""
    if config.unit == USER:
        allowed = "'record': the canaries of an audit are records, and it measures no other unit"
        raise InvalidValue("unit", config.unit, allowed)


def _short(
    config: RunConfig, given: Iterable[str], records: int, *, once: bool
) -> tuple[RunConfig, RunConfig]:
    """Return the recipe's settings, and those of the attacked runs: a short run's, and the given.

    Raises
    ------
    InvalidValue
        A key was given that no audit follows, or the settings cannot be used together.
    """
    kept, _ = followed(AUDIT, config, given)
    config = settled(config, build_task(config.task, config)).config
    kept = replace(kept, num_clients=config.num_clients, precision=config.precision)
    clients = {"num-clients": 10} if once and not config.clients_are else {}
    own = {key: config.items()[key] for key in set(map(key_named, given))}
    return config, short(kept, records, {**clients, **own})


def _other_values(config: RunConfig, attacked: RunConfig) -> dict[str, Any]:
    """Return the recipe's values that the attacked runs do not have, by key."""
    runs = attacked.items()
    return {key: value for key, value in config.items().items() if value != runs[key]}


def _write(found: AuditRecord, file: Path | None, run: Path | None) -> None:
    """Write the record and its picture, and attach it to a run."""
    if file is not None:
        write_json(file, found.as_json())
        _draw(found, file.with_suffix(".png"))
    if run is not None:
        attach(found, run)


def _draw(found: AuditRecord, picture: Path) -> None:
    """Draw the record if the extra for plots is installed."""
    try:
        require("plots")
    except NotInstalled:
        return
    from fedlora_flwr.audit.picture import plot_audit

    plot_audit(found, picture)
