"""Forecasts how many clients fit on the GPUs at the same time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.forecast.memory import Memory
from fedlora_flwr.lora.build import resolve_device

CONTEXT = 700_000_000
"""Bytes that CUDA and its libraries take on a GPU for each process."""


@dataclass(frozen=True)
class Placement:
    """Where clients train.

    Parameters
    ----------
    workers : int or None
        Processes at a time; ``None`` if only the cores limit them.
    gpu_share : float
        Part of a GPU that one worker gets, 0 without GPUs.
    """

    workers: int | None
    gpu_share: float = 0.0


def place(config: RunConfig, workers: int | None) -> Placement:
    """Check that a run's workers fit on its device; without a GPU there is nothing to check.

    Parameters
    ----------
    config : RunConfig
        The run.
    workers : int or None
        Processes asked for; ``None`` for as many as fit.

    Raises
    ------
    InvalidValue
        One client, or the asked number of workers, needs more memory than is free.
    """
    device = resolve_device(config.device)
    if device.type != "cuda":
        return Placement(workers)
    chosen = range(torch.cuda.device_count()) if device.index is None else [device.index]
    free = [torch.cuda.mem_get_info(index)[0] for index in chosen]
    cores = max((os.cpu_count() or 1) // config.client_threads, 1)
    found = fit(forecast(config).memory, free, cores, workers)
    # A run that names one GPU has its workers there, even if Ray would place them elsewhere.
    return found if device.index is None else Placement(found.workers)


def fit(memory: Memory, free: Sequence[int], cores: int, workers: int | None) -> Placement:
    """Work out how many workers fit.

    Parameters
    ----------
    memory : Memory
        Memory of one client.
    free : Sequence[int]
        Free bytes of each GPU. The first also holds the server's model.
    cores : int
        Workers that the machine's cores carry.
    workers : int or None
        Processes asked for.

    Raises
    ------
    InvalidValue
        See `place`.
    """
    need, server = memory.total + CONTEXT, memory.backbone + CONTEXT
    room = [max(free[0] - server, 0), *free[1:]]
    capacity = sum(bytes_ // need for bytes_ in room)
    sizes = f"one needs about {need / 1e9:.1f} GB, and {max(room) / 1e9:.1f} GB of a GPU are free"
    if not capacity:
        raise InvalidValue(
            "device",
            "cuda",
            f"a GPU with room for a client: {sizes}. A smaller microbatch-size or max-length, "
            "quantization, or device = 'cpu' help",
        )
    if workers is not None and workers > capacity:
        raise InvalidValue("workers", workers, f"at most {capacity}: {sizes}")
    chosen = min(workers or cores, capacity)
    # Ray puts whole workers on a GPU, so the GPU with the most workers decides the share of each.
    return Placement(chosen, 1 / -(-chosen // len(free)))
