"""A device with texts, or whatever else the package's tasks read, and a model of its family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fedlora_flwr.clients.device import Device as OwnFile
from fedlora_flwr.clients.trainer import process_trainer
from tests.hostile.canaries import Builder
from tests.hostile.conftest import MakeDevice
from tests.hostile.device import RUN, Device

Run = dict[str, Any]
FIGURES = {
    "question-answering": ("f1", "exact_match"),
    "instruction-tuning": ("perplexity", "token_accuracy"),
}


def plant(make_device: MakeDevice, build: Builder, **settings: Any) -> Device:
    """Set up a device whose data have a word in every place for private text."""
    device = make_device(build=build, **settings)
    if device.public.figures:
        task = str(device.own["task"])
        figures = frozenset({"loss", *FIGURES.get(task, ("accuracy",))})
        device.public = replace(device.public, figures=figures)
    device.run = {
        **RUN, "task": device.own["task"], "max-length": 48, "batch-size": 8, "num-rounds": 3,
        "lora-targets": "", "image-size": 0,
    }  # fmt: skip
    return device


def own_arrays(device: Device, run: Run | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Return the start that a server has too: it follows from the model and the seed."""
    trainer = process_trainer(OwnFile.read(device.file).config(run or device.run))
    arrays = {name: np.array(values) for name, values in trainer.start.items()}
    shapes = {name: _shape(name, values.shape) for name, values in arrays.items()}
    device.public = replace(device.public, shapes=shapes, blocks=len(trainer.layout.blocks))
    return arrays


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ".lora_A." in name:
        return (-1, *shape[1:])
    return (*shape[:-1], -1) if ".lora_B." in name else shape
