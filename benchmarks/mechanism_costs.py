"""What a method's steps, uploads and means cost, compared with DP-LoRA's and with an SVD.

A library of `benchmarks.mechanisms`, without a command of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import nn

from benchmarks.figures import peak_bytes, take_turns
from benchmarks.server_steps import (
    AVERAGE_BOTH,
    AVERAGE_ONE,
    FEDSVD,
    FLEXLORA,
    MEAN_OF_PRODUCTS,
    PRODUCT_OF_MEAN,
    Cell,
    time_cell,
    time_libraries,
)
from benchmarks.step import ALL_LINEARS, Shape, StepBench, roberta, token_batch
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import strategy_class

Row: TypeAlias = dict[str, Any]

METHODS = ("dp-lora", "ffa-lora", "rolora", "la-lora", "as-lora")
ROUNDS = STEPS = 2
"""Rounds and local steps in which every method has trained all that it ever trains."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Parameters
    ----------
    layers, width, tokens, records : int
        The text model's layers, width and tokens per record, and the records of a step.
    repetitions : int
        Turns over which medians are taken.
    cells : tuple[Cell, ...]
        Layers to aggregate: (m, n), clients and rank.
    """

    layers: int = 4
    width: int = 256
    tokens: int = 64
    records: int = 16
    repetitions: int = 5
    cells: tuple[Cell, ...] = (((144, 48), 6, 4), ((768, 768), 6, 8), ((1024, 1024), 6, 8))


QUICK = Size(2, 16, 9, 3, 1, (((24, 16), 3, 2),))


def measure_rounds(size: Size) -> Iterator[Row]:
    """Yield each method's time, peak memory and upload, all linear layers adapted."""
    shape = _shape(size)
    bench = StepBench(shape, shape.targets[ALL_LINEARS], size.records, torch.device("cpu"))
    parameters = bench.engine.adapted.parameters
    layout = Layout.of(parameters)
    steps = {name: list(_active(name, layout)) for name in METHODS}
    sets = {active for found in steps.values() for active in found}
    calls = {" ".join(active): bench.call(active) for active in sets}
    with threadpool_limits(1), bench.engine.training():
        seconds = take_turns(calls, size.repetitions)
        peaks = {name: peak_bytes(call) / 1e6 for name, call in calls.items()}
    for name, found in steps.items():
        named = [" ".join(active) for active in found]
        sent = sum(
            4 * sum(parameters[n].numel() for n in layout.trained(plan, STEPS))
            for plan in _plans(name, layout)
        )
        yield {
            "method": name,
            "seconds": sum(seconds[one] for one in named) / len(named),
            "peak_mb": max(peaks[one] for one in named),
            "mean_peak_mb": sum(peaks[one] for one in named) / len(named),
            "upload_kb": sent / ROUNDS / 1000,
        }


def _plans(name: str, layout: Layout) -> Iterator[ComponentPlan]:
    """Yield the plans of two rounds. AS-LoRA's are half and half, as its choices are on average."""
    if name == "as-lora":
        modes = ("BA" * len(layout.blocks))[: len(layout.blocks)]
        yield ComponentPlan.uniform(modes)
        yield ComponentPlan.uniform(modes.translate(str.maketrans("AB", "BA")))
        return
    strategy = strategy_class(name)()
    for number in range(1, ROUNDS + 1):
        yield strategy.plan(number, layout)


def _active(name: str, layout: Layout) -> Iterator[tuple[str, ...]]:
    for plan in _plans(name, layout):
        for step in range(1, STEPS + 1):
            yield layout.active(plan, step)


def _shape(size: Size) -> Shape:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=1000, hidden_size=size.width, intermediate_size=4 * size.width,
            num_hidden_layers=size.layers, num_attention_heads=max(1, size.width // 32),
            max_position_embeddings=size.tokens + 4, num_labels=2,
        )  # fmt: skip
        model: nn.Module = RobertaForSequenceClassification(config)
        return model

    def batch(count: int) -> dict[str, torch.Tensor]:
        return token_batch(count, size.tokens, 1000)

    return replace(roberta(), build=build, batch=batch)


FULL: Mapping[str, str] = {
    AVERAGE_BOTH: MEAN_OF_PRODUCTS,
    AVERAGE_ONE: MEAN_OF_PRODUCTS,
    FEDSVD: PRODUCT_OF_MEAN,
    FLEXLORA: MEAN_OF_PRODUCTS,
}
"""For each server step, the full SVD of published code that it is compared with."""


def measure_aggregation(size: Size) -> Iterator[Row]:
    """Yield the seconds of each server step for one layer, and how many times an SVD takes them."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for cell in size.cells:
            libraries = time_libraries(cell[0])
            best = min(libraries, key=libraries.__getitem__)
            seconds = time_cell(cell, best, size.repetitions)
            (m, n), clients, rank = cell
            for name, full in FULL.items():
                yield {
                    "layer": f"{m} x {n}",
                    "clients": clients,
                    "rank": rank,
                    "method": name,
                    "milliseconds": 1e3 * seconds[name],
                    "svd_milliseconds": 1e3 * seconds[full],
                    "ratio": seconds[full] / seconds[name],
                }
