"""How near the memory that `fedlora plan` forecasts is to what a private step takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.figures import Figure, peak_bytes
from benchmarks.step import ALPHA, Shape, StepBench, roberta, swin
from benchmarks.tasks import ShapeTask
from fedlora_flwr.config import RunConfig
from fedlora_flwr.forecast.memory import step_memory
from fedlora_flwr.lora.adapters import LoRASpec, attach

BAR = 0.10
"""Largest part of the measured memory by which a forecast may be wrong."""


def five_shapes() -> list[Shape]:
    """Return text and image models with few and with all linear layers adapted."""
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    calm = roberta("RoBERTa-base without dropout", **still)
    return [roberta(), swin(), replace(calm, targets=_first(calm))]


def _first(shape: Shape) -> dict[str, str]:
    return dict(list(shape.targets.items())[:1])


def measure(shapes: Sequence[Shape], records: int, on_figure: Callable[[Figure], None]) -> None:
    """Compare forecast and measured memory of a step on both factors, on the CPU.

    Parameters
    ----------
    shapes : Sequence[Shape]
        Models.
    records : int
        Records in the batch.
    on_figure : callable
        Called with each figure once it is measured.
    """
    for shape in shapes:
        for layers, targets in shape.targets.items():
            bench = StepBench(shape, targets, records, torch.device("cpu"))
            call = bench.call()
            with bench.engine.training():
                call()
                peak = peak_bytes(call)
            every = bench.engine.adapted.model.parameters()
            weights = sum(p.numel() * p.element_size() for p in every)
            found, made = forecast(bench, records), weights + peak
            what = f"{shape.name}, b = {records}, {layers}: error of the forecast"
            note = f"forecast {found / 1e6:.0f} MB, measured {made / 1e6:.0f} MB"
            error = abs(found - made) / 1e6
            on_figure(Figure(what, error, made / 1e6, "MB", "measured memory", BAR, note))


def forecast(bench: StepBench, records: int) -> int:
    """Return the bytes that `fedlora plan` shows for a client of these settings."""
    shape, parameters = bench.shape, bench.engine.adapted.parameters
    with torch.device("meta"):
        spec = LoRASpec(bench.rank, ALPHA, 0.0, bench.targets, (shape.head,))
        bare = attach(shape.build(), spec, seed=0)
    trained = sum(parameter.numel() for parameter in parameters.values())
    config = RunConfig.of({"batch-size": records, "optimizer": "sgd", "momentum": 0.0})
    task: Any = _Same(shape)  # It serves the one shape of its own records.
    return step_memory(config, task, bare, trained, records).total


class _Same(ShapeTask):
    """A benchmark's model as a task."""

    def __init__(self, shape: Shape) -> None:
        self._given = shape
        super().__init__(None)

    def shape(self) -> Shape:
        """Return the model and its input."""
        return self._given
