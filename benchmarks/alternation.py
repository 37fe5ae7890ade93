"""Compares steps that train one factor with steps that train both (LA-LoRA and DP-LoRA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.figures import Figure, peak_bytes, take_turns
from benchmarks.step import ALL_LINEARS, PHASES, Shape, StepBench
from fedlora_flwr.layout import factor_of

TIME_BAR, MEMORY_BAR = 0.90, 0.80


def measure(
    shapes: Sequence[Shape],
    records: int,
    repetitions: int,
    device: torch.device,
    on_figure: Callable[[Figure], None],
) -> None:
    """Compare a round that alternates with one that trains both factors, all linears adapted.

    Parameters
    ----------
    shapes : Sequence[Shape]
        Models.
    records : int
        Records in the batch, the same in every step.
    repetitions : int
        Number of turns over which medians are taken.
    device : torch.device
        Device of the models.
    on_figure : callable
        Called with each figure once it is measured.
    """
    for shape in shapes:
        bench = StepBench(shape, shape.targets[ALL_LINEARS], records, device)
        arrays = list(bench.engine.adapted.parameters)
        calls = {
            phase: bench.call([name for name in arrays if factor_of(name) in factors])
            for phase, factors in PHASES.items()
        }
        frozen = bench.call([name for name in arrays if factor_of(name) is None])
        with bench.engine.training():
            seconds = take_turns({**calls, "head": frozen}, repetitions)
            megabytes = {name: peak_bytes(call) / 1e6 for name, call in calls.items()}
        what = f"{shape.name}, b = {records}, {ALL_LINEARS}"
        alternating = (seconds["A"] + seconds["B"]) / 2
        found = [
            ("A and B in turn: time", alternating, seconds["AB"], "s", TIME_BAR),
            ("head alone: time", seconds["head"], seconds["AB"], "s", None),
            ("A and B in turn: peak memory", max(megabytes["A"], megabytes["B"]),
             megabytes["AB"], "MB", MEMORY_BAR),
            ("B alone: peak memory", megabytes["B"], megabytes["AB"], "MB", None),
        ]  # fmt: skip
        for name, ours, both, unit, bar in found:
            on_figure(Figure(f"{what}, {name}", ours, both, unit, "A and B at once", bar))
