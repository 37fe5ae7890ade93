"""Settles what a run leaves open before it begins, so that all its processes agree."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.settled import AUTO
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import skeleton
from fedlora_flwr.lora.auto_precision import Measure, Product, measure, speeds_of
from fedlora_flwr.lora.build import resolve_device
from fedlora_flwr.tasks.registry import Task, with_clients


class Settled(NamedTuple):
    """A configuration whose number of clients and precision are known.

    Parameters
    ----------
    config : RunConfig
        The configuration, with a number of clients above 0, and ``"fp32"`` or ``"bf16"``.
    said : str
        Which precision was chosen and why; empty where the user has chosen.
    """

    config: RunConfig
    said: str


def settled(
    config: RunConfig, task: Task, measured: Measure = measure, *, opened: bool = True
) -> Settled:
    """Replace ``num-clients = 0`` by a number, and ``precision = "auto"`` by the faster one here.

    Parameters
    ----------
    config : RunConfig
        The run.
    task : Task
        Its task, whose frozen backbone gives the size of the products.
    measured : callable
        Measures both precisions unless this machine's cache holds the result.
    opened : bool (default: True)
        Whether the private records may be opened, to count the clients in them.

    Raises
    ------
    InvalidValue
        This machine has no such device, the adapters cannot be attached, or the clients cannot be
        counted.
    ModelFailed
        The device cannot multiply in bf16.
    """
    if not (opened or config.num_clients) and config.partitioner == "natural-id":
        allowed = "a number above 0 with --records, which opens no data to count the clients in"
        raise InvalidValue("num-clients", 0, allowed)
    config = with_clients(config, task)
    if config.precision != AUTO:
        return Settled(config, "")
    device = resolve_device(config.device)
    product = Product.of(skeleton(config, task).model, device, config.client_threads)
    speeds = speeds_of(product, measured)
    return Settled(replace(config, precision=speeds.precision), str(speeds))
