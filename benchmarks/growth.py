"""How the private step's cost grows with rank, records and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.figures import Call, Figure, peak_bytes, take_turns
from benchmarks.step import ALL_LINEARS, RANK, Shape, StepBench, roberta

Cell = tuple[Shape, int, int]
"""Model, records in the batch, rank."""


@dataclass(frozen=True)
class Setting:
    """The varied quantities, one at a time. Each row is relative to its first cell."""

    rows: Mapping[str, list[Cell]] = field(default_factory=lambda: _rows())
    repetitions: int = 3


def _rows() -> dict[str, list[Cell]]:
    def layers(count: int) -> Shape:
        return roberta("RoBERTa", num_hidden_layers=count)

    return {
        "rank": [(layers(4), 4, rank) for rank in (1, 4, 16, 64)],
        "records": [(layers(4), records, RANK) for records in (1, 4, 16)],
        "layers": [(layers(count), 4, RANK) for count in (2, 4, 8)],
    }


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Measure time and memory of a step of both factors on all linear layers, row by row."""
    for name, cells in setting.rows.items():
        calls = {_label(name, cell): _step(cell) for cell in cells}
        seconds = take_turns(calls, setting.repetitions)
        megabytes = {label: peak_bytes(call) / 1e6 for label, call in calls.items()}
        first, *others = calls
        for label in others:
            for what, unit, found in (("time", "s", seconds), ("peak memory", "MB", megabytes)):
                on_figure(Figure(f"{label}: {what}", found[label], found[first], unit, first))


def _step(cell: Cell) -> Call:
    shape, records, rank = cell
    return StepBench(shape, shape.targets[ALL_LINEARS], records, torch.device("cpu"), rank).call()


def _label(name: str, cell: Cell) -> str:
    shape, records, rank = cell
    with torch.device("meta"):
        size = sum(p.numel() for p in shape.build().parameters()) / 1e6
    value = {"rank": f"r = {rank}", "records": f"b = {records}", "layers": f"{size:.0f} M weights"}
    return f"growth with {name}: {value[name]}"
