"""The figure by which a comparison chooses rates, and which its tables report."""

from __future__ import annotations

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.server.best import is_better
from fedlora_flwr.tasks.registry import build_task

_KEY = "metric-for-best-model"


def metric_of(config: RunConfig) -> str:
    """Return the name of the figure: ``metric-for-best-model``, and else the task's own."""
    return config.metric_for_best_model or build_task(config.task, config).metric


def check_metric(config: RunConfig) -> None:
    """Refuse a figure that a comparison cannot use, before its first run.

    A task's own figure is always there. Another one is looked for in a measurement of the model
    before training.

    Parameters
    ----------
    config : RunConfig
        What all runs share.

    Raises
    ------
    InvalidValue
        Less of the figure is better, or the task does not measure it.
    """
    from fedlora_flwr.lora.build import build_adapted
    from fedlora_flwr.tasks.answers import measured

    metric = metric_of(config)
    if is_better(metric, 0.0, 1.0):
        raise InvalidValue(
            _KEY, metric, "a figure of which more is better: a comparison shows shares in percent"
        )
    task = build_task(config.task, config)
    if metric != task.metric:
        model = build_adapted(config, task).model
        write = config.generation_limit > 0
        found, _ = measured(task, model, task.test_records(), write=write)
        if metric not in found:
            raise unknown(_KEY, metric, found)
