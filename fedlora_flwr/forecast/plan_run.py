"""``fedlora_flwr.plan_run``: what ``fedlora plan`` knows of a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.followed import PLAN, followed
from fedlora_flwr.config.recipes import config_of
from fedlora_flwr.errors import require
from fedlora_flwr.forecast import gradients
from fedlora_flwr.forecast.duration import measure
from fedlora_flwr.forecast.forecast import Forecast, forecast
from fedlora_flwr.forecast.precision import settled
from fedlora_flwr.server.given import given
from fedlora_flwr.tasks.registry import build_task, extras_of

if TYPE_CHECKING:
    from fedlora_flwr.data.given import Table
    from fedlora_flwr.strategies.base import FedLoRA
    from fedlora_flwr.tasks.registry import Task, TaskFactory


def plan_run(
    recipe: str | Path | RunConfig = "digits",
    *,
    records: int | None = None,
    task: str | Task | TaskFactory | None = None,
    strategy: str | type[FedLoRA] | None = None,
    train: Table | None = None,
    test: Table | None = None,
    **changes: Any,
) -> Forecast:
    """Work out what a run would cost, what it promises and how much noise it has.

    Nothing is trained but for the measurement of one step, whose result is not kept.

    Parameters
    ----------
    recipe, task, strategy, train, test, **changes
        As for `fedlora_flwr.simulate`.
    records : int, optional
        Records of each client, instead of opening the data.

    Returns
    -------
    Forecast
        Its ``table`` has a row per client, and its ``as_json()`` is what ``fedlora plan --json``
        prints.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or model or data cannot be found.
    PrivacyViolation, ModelFailed
        The model cannot train (see `fedlora_flwr.server.rehearsal`).

    Examples
    --------
    >>> found = plan_run("digits", records=200, num_clients=2, epsilon=3)
    >>> found.table["records"].tolist(), found.broken
    ([200, 200], 0)
    """
    with ExitStack() as stack:
        changes |= given(stack, task=task, strategy=strategy, train=train, test=test)
        config = config_of(recipe, changes)
        require(*extras_of(config.task), *(["flwr_datasets"] if records is None else []))
        made = build_task(config.task, config)
        config, precision = settled(config, made, opened=records is None)
        found = _foreseen(config, records, made)
        found = replace(found, precision=precision)
        if found.broken:
            return found
        norms = gradients.measure(config, made, found, opened=records is None)
        warnings = [*found.warnings, *norms.warnings]
        found = replace(found, gradients=norms, warnings=warnings)
        return replace(found, duration=measure(config, made, records))


def plan_budgets(
    config: RunConfig, epsilons: Sequence[float], records: int | None = None
) -> list[Forecast]:
    """Work out the same run at several privacy budgets; nothing is measured.

    Parameters
    ----------
    config : RunConfig
        The run; its ε is replaced.
    epsilons : Sequence[float]
        The budgets; infinity means no privacy.
    records : int, optional
        Records of each client, instead of opening the data.

    Returns
    -------
    list[Forecast]
        One per budget, without `Forecast.gradients` and `Forecast.duration`.

    Raises
    ------
    InvalidValue, PrivacyViolation, ModelFailed
        As for `plan_run`.
    """
    made = build_task(config.task, config)
    config = settled(config, made, opened=records is None).config
    return [_foreseen(replace(config, epsilon=epsilon), records, made) for epsilon in epsilons]


def _foreseen(config: RunConfig, records: int | None, task: Task) -> Forecast:
    """Return a forecast, with a warning for each key of the run that it does not follow."""
    config, left = followed(PLAN, config)
    found = forecast(config, records, task)
    return replace(found, warnings=[*found.warnings, *left])
