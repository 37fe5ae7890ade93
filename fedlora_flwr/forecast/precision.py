"""Settles ``precision = "auto"`` before a run, so that all its processes compute alike."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import AUTO
from fedlora_flwr.forecast.forecast import skeleton
from fedlora_flwr.lora.auto_precision import Measure, Product, measure, speeds_of
from fedlora_flwr.lora.build import resolve_device
from fedlora_flwr.tasks.registry import Task


class Settled(NamedTuple):
    """A configuration whose precision is known.

    Parameters
    ----------
    config : RunConfig
        The configuration, with ``"fp32"`` or ``"bf16"``.
    said : str
        What was chosen and why; empty where the user has chosen.
    """

    config: RunConfig
    said: str


def settled(config: RunConfig, task: Task, measured: Measure = measure) -> Settled:
    """Replace ``precision = "auto"`` by the precision that is faster on this machine.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        Its task, whose frozen backbone gives the size of the products.
    measured : callable
        Measures both precisions unless this machine's cache holds the result.

    Raises
    ------
    InvalidValue
        This machine has no such device, or the adapters cannot be attached.
    ModelFailed
        The device cannot multiply in bf16.
    """
    if config.precision != AUTO:
        return Settled(config, "")
    device = resolve_device(config.device)
    product = Product.of(skeleton(config, task).model, device, config.client_threads)
    speeds = speeds_of(product, measured)
    return Settled(replace(config, precision=speeds.precision), str(speeds))
