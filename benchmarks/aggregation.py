"""The cost of aggregation, compared with the SVD of full m x n matrices in published code.

Run ``python -m benchmarks.aggregation``. For each layer shape, number of clients and rank, every
strategy and the full SVD take turns on the same fp32 uploads, with one thread each. The median
seconds of CPU of a layer are multiplied by the number of such layers in the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.server_steps import (
    ADDING,
    AVERAGE_BOTH,
    AVERAGE_ONE,
    ENDING,
    FEDEX,
    FEDSA,
    FEDSVD,
    FLEXLORA,
    FLORA,
    MEAN_OF_PRODUCTS,
    MOVED,
    PRODUCT_OF_MEAN,
    UNRELATED,
    Cell,
    Shape,
    compare,
    peaks,
    time_cell,
    time_libraries,
)
from fedlora_flwr.environment import machine, versions

AVERAGING_BAR, SVD_BAR, EQUALITY_BAR = 180.0, 30.0, 1e-10
BARS = {
    AVERAGE_BOTH: AVERAGING_BAR,
    AVERAGE_ONE: AVERAGING_BAR,
    FEDSA: AVERAGING_BAR,
    FEDSVD: SVD_BAR,
    FLEXLORA: SVD_BAR,
    UNRELATED: SVD_BAR,
}


def swin(dims: Sequence[int], depths: Sequence[int]) -> dict[Shape, int]:
    """Count the shapes of ``attn.qkv`` (3d x d) and ``attn.proj`` (d x d)."""
    pairs = list(zip(dims, depths, strict=True))
    return {(k * d, d): depth for d, depth in pairs for k in (3, 1)}


@dataclass(frozen=True)
class Plan:
    """What to measure: layers of each model by shape, numbers of clients, ranks, repetitions."""

    models: dict[str, dict[Shape, int]]
    clients: tuple[int, ...]
    ranks: tuple[int, ...]
    repetitions: int

    @property
    def shapes(self) -> list[Shape]:
        """Every distinct shape, in order."""
        return list(dict.fromkeys(shape for layers in self.models.values() for shape in layers))

    @property
    def cells(self) -> list[Cell]:
        """Every shape with every number of clients and rank."""
        return [
            (s, clients, r) for s in self.shapes for clients in self.clients for r in self.ranks
        ]


FULL = Plan(
    {
        "RoBERTa-large": {(1024, 1024): 48},
        "Swin-B": swin((128, 256, 512, 1024), (2, 2, 18, 2)),
    },
    clients=(6, 100),
    ranks=(8, 16, 64),
    repetitions=3,
)
QUICK = Plan({"square": {(96, 96): 2}, "swin": swin((32,), (2,))}, (3, 8), (2, 8), 2)


@dataclass
class Results:
    """All measurements of a run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    equality: list[dict[str, Any]] = field(default_factory=list)
    libraries: list[dict[str, Any]] = field(default_factory=list)


def measure(plan: Plan, progress: Progress) -> Results:
    """Run the whole plan with one thread for each library."""
    results, medians, best, memory = Results(), {}, {}, {}
    kinds = [(cell, related) for cell in plan.cells for related in (True, False)]
    for shape in progress.track(plan.shapes, description="full SVD by library"):
        seconds = time_libraries(shape)
        best[shape] = min(seconds, key=seconds.__getitem__)
        results.libraries.append({"shape": list(shape), "used": best[shape], "seconds": seconds})
    for cell in progress.track(plan.cells, description="seconds"):
        medians[cell], memory[cell] = time_cell(cell, best[cell[0]], plan.repetitions), peaks(cell)
    for cell, related in progress.track(kinds, description="equality in fp64"):
        results.equality.append(compare(cell, related))
    results.rows = list(make_rows(plan, medians, memory))
    return results


def make_rows(
    plan: Plan, medians: dict[Cell, dict[str, float]], memory: dict[Cell, dict[str, int]]
) -> Iterable[dict[str, Any]]:
    """Sum the layers of each model, and add the bar and why it is not met."""
    for model, layers in plan.models.items():
        for clients in plan.clients:
            for rank in plan.ranks:
                total: dict[str, float] = {}
                for shape, count in layers.items():
                    for name, seconds in medians[shape, clients, rank].items():
                        total[name] = total.get(name, 0.0) + count * seconds
                stacked = sum(
                    count for shape, count in layers.items() if clients * rank >= min(shape)
                )
                for name in list(total)[:-2]:
                    full = total[PRODUCT_OF_MEAN if name == FEDSVD else MEAN_OF_PRODUCTS]
                    bar, ratio = BARS.get(name), full / total[name]
                    met = None if bar is None else ratio >= bar
                    yield {
                        "model": model,
                        "clients": clients,
                        "rank": rank,
                        "strategy": name,
                        "seconds": total[name],
                        "full_svd_seconds": full,
                        "ratio": ratio,
                        "bar": bar,
                        "met": met,
                        "kept_mb": kept_bytes(name, layers, clients, rank) / 1e6,
                        "peak_mb": max(memory[s, clients, rank][name] for s in layers) / 1e6,
                        "layers": sum(layers.values()),
                        "layers_with_stacked_rank_of_a_side": stacked,
                        "why": why(name, clients, rank) if met is False or ratio < 1 else None,
                    }


def kept_bytes(name: str, layers: dict[Shape, int], clients: int, rank: int) -> int:
    """Return the bytes of what a server keeps of a model's uploads until it aggregates them."""
    left = rank * sum(count * m for (m, _), count in layers.items())
    right = rank * sum(count * n for (_, n), count in layers.items())
    if name in (ADDING, ENDING):
        return 24 * left  # Three sums of fp64 (see `fedlora_flwr.algebra.update_sums`).
    entries = {AVERAGE_ONE: left, FEDSVD: left, FEDSA: right}.get(name, left + right)
    return 4 * clients * entries


def why(name: str, clients: int, rank: int) -> str:
    """Name the remaining cost if a bar is not met or the full SVD is faster."""
    if name == ADDING:
        return "It sums in twice the digits of fp64, and compares the uploads, while others train."
    if BARS.get(name) == AVERAGING_BAR:
        return (
            "A mean reads every upload: its seconds grow with clients times rank, those of an SVD "
            "do not."
        )
    if name == FEDSVD:
        return (
            "The mean of B grows with clients times rank, and QR of two thin factors nears the "
            "full SVD where the rank is not small against the layer."
        )
    sums = f"The stacked rank is {clients * rank}: "
    if name in (FLORA, FEDEX):
        return sums + (
            "only QR and the SVD of a core are exact, and the core grows with the stacked rank, up "
            "to the size of the matrix. From there on forming the matrix is the cheapest exact "
            "way, and published code forms it in fp32, ours in fp64."
        )
    if name == UNRELATED:
        return sums + (
            "without a gap behind the rank the matrix is formed, in fp64, and the eigenvectors of "
            "its Gram matrix take as long as a part of its SVD."
        )
    return sums + (
        "the iteration multiplies all of it with as many vectors as the rank, nine times, in fp64. "
        "This grows with clients times rank squared; the SVD of the matrix does not."
    )


def report(results: Results, arguments: Sequence[str]) -> dict[str, object]:
    """Put the results in the form of the JSON file."""
    figures = [
        max(row[name] for row in results.equality) for name in (FEDSVD, FLEXLORA, FLORA, FEDEX)
    ]
    return {
        "command": " ".join(["python -m benchmarks.aggregation", *arguments]),
        "machine": machine(),
        "versions": versions(),
        "threads": 1,
        "method": (
            "Medians of interleaved repetitions of one layer of each shape, fp32 uploads, times "
            "the number of such layers, in seconds of CPU. kept_mb is what a server keeps of the "
            "model's uploads until it aggregates them, and peak_mb what the step takes beside "
            "them, for the largest layer. The full SVD forms the mean in fp32 and uses the "
            "library, NumPy or torch, that is faster for the shape. Clients share a start and "
            "differ by "
            f"{MOVED} of its entries' size; 'unrelated clients' are independent draws."
        ),
        "equality": {
            "bar": EQUALITY_BAR,
            "met": max(figures) <= EQUALITY_BAR,
            "largest": dict(zip((FEDSVD, FLEXLORA, FLORA, FEDEX), figures, strict=True)),
            "unit": "largest difference of an entry of the products / largest singular value, fp64",
            "cells": results.equality,
        },
        "libraries": results.libraries,
        "rows": results.rows,
    }


def show(content: dict[str, Any], console: Console) -> None:
    """Print the table and the bars."""
    table = Table("model", "clients", "r", "strategy", title="Aggregation, one thread")
    for title in ("seconds", "full SVD, s", "ratio", "bar", "met", "kept MB", "peak MB"):
        table.add_column(title, justify="right")
    for row in content["rows"]:
        table.add_row(
            row["model"],
            str(row["clients"]),
            str(row["rank"]),
            row["strategy"],
            f"{row['seconds']:.4f}",
            f"{row['full_svd_seconds']:.3f}",
            f"{row['ratio']:.1f}",
            "–" if row["bar"] is None else f"{row['bar']:g}",
            {True: "yes", False: "no", None: "–"}[row["met"]],
            f"{row['kept_mb']:.1f}",
            f"{row['peak_mb']:.1f}",
        )
    console.print(table)
    equality = content["equality"]
    console.print(
        "Equal to the full SVD in fp64 to "
        + ", ".join(f"{value:.1e} ({name})" for name, value in equality["largest"].items())
        + f"; bar {equality['bar']:g} {'met' if equality['met'] else 'not met'}."
    )
    for reason in dict.fromkeys(
        f"{r['strategy']}: {r['why']}" for r in content["rows"] if r["why"]
    ):
        console.print(f"Not met or slower, {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON file if one is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    begin, load = time.perf_counter(), os.getloadavg()[0]
    with threadpool_limits(1), Progress(console=console) as progress:
        results = measure(QUICK if options.quick else FULL, progress)
    flags = ["--quick"] if options.quick else []
    content = report(results, flags)
    content |= {"elapsed_seconds": time.perf_counter() - begin, "load_average_before": load}
    show(content, console)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
