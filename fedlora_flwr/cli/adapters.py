"""Commands for use after a run: ``fedlora evaluate``, ``sharpness``, ``predict`` and ``merge``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides
from fedlora_flwr.config.overrides import parse_overrides
from fedlora_flwr.errors import require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.report.scales import heading, in_words
from fedlora_flwr.terminal import Table, say_loading, show, show_json, show_line, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.trained.evaluate import Evaluation
    from fedlora_flwr.trained.sharpness import Sharpness

_Adapter = Annotated[
    Path, typer.Argument(help="Folder of a run, of an adapter, or of a merged language model.")
]
_Trained = Annotated[Path, typer.Argument(help="Folder of a run, or of an adapter.")]
_Labeled = Annotated[
    Path | None,
    typer.Option(help="Labeled records: a file, or a folder; the run's own if not given."),
]
_LATEST = Path("runs/latest")
_MOST_CLASSES = 20
"""A confusion matrix of more classes is only in the JSON."""


def evaluate(
    adapter: _Adapter = _LATEST,
    data: _Labeled = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure an adapter on labeled records; for classes also one by one, with confusions."""
    changes = _changes(overrides)
    with uncollected():
        from fedlora_flwr.trained.evaluate import evaluate as measure

    found = measure(adapter, data, **changes)
    if as_json:
        show_json(found.as_json())
        return
    console = Console()
    show_lines(console, _figures(found))
    if found.counts:
        _show_classes(console, found)


def sharpness(
    adapter: _Trained = _LATEST,
    data: _Labeled = None,
    parts: Annotated[
        str,
        typer.Option(help="What is moved: A, B, head, and W, the adapted layers' own weights."),
    ] = "A,B",
    radius: Annotated[float, typer.Option(help="Norm of a move.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Random directions to move in.")] = 10,
    probes: Annotated[int, typer.Option(help="Vectors of random signs for the trace.")] = 30,
    records: Annotated[int, typer.Option(help="Most records to measure on.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of directions and signs.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure the curvature of the loss around an adapter, and what a small move costs."""
    changes = _changes(overrides)
    with uncollected():
        from fedlora_flwr.trained.sharpness import sharpness as measure

    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    found = measure(
        adapter, data, parts=chosen, radius=radius, draws=draws, probes=probes, records=records,
        seed=seed, **changes,
    )  # fmt: skip
    if as_json:
        show_json(found.as_json())
        return
    show_lines(Console(), _curvature(found))


def predict(
    adapter: _Adapter,
    data: Annotated[Path, typer.Argument(help="Records: a file, or a folder with one split.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .parquet, .jsonl or .csv file.")
    ] = Path("predictions.parquet"),
    overrides: Overrides = None,
) -> None:
    """Write what an adapter's model says of each record of a file, which needs no labels."""
    changes = _changes(overrides)
    with uncollected():
        from fedlora_flwr.trained.predict import predict as say

    found = say(adapter, data, output, **changes)
    show_lines(Console(), [("Records", f"{len(found):,}"), ("Results", str(output))])


def merge(
    adapter: _Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the model.")],
    overrides: Overrides = None,
) -> None:
    """Write a plain transformers or timm model with the adapter merged into its weights."""
    changes = parse_overrides(overrides or [])
    require("client")
    say_loading()
    with uncollected():
        from fedlora_flwr.trained.merge import merge as write

    show_lines(Console(), [("Model", str(write(adapter, output, **changes)))])


def _changes(overrides: list[str] | None) -> dict[str, Any]:
    changes = parse_overrides(overrides or [])
    require("client", "pandas")
    say_loading()
    return changes


def _figures(found: Evaluation) -> Iterator[tuple[str, str]]:
    yield "Adapter", str(found.adapter)
    yield "Records", f"{found.records:,}"
    for name, value in found.metrics.items():
        yield heading(name), f"{value:.4f}"


def _curvature(found: Sharpness) -> Iterator[tuple[str, str]]:
    yield "Adapter", str(found.adapter)
    yield "Records", f"{found.records:,}"
    yield "Parts", f"{', '.join(found.parts)}: {found.coordinates:,} coordinates"
    yield "Loss", f"{found.metrics['loss']:.4f}, gradient of norm {found.gradient_norm:.3g}"
    yield "Largest eigenvalue", f"{found.largest_eigenvalue:.4g} ± {found.residual:.1g}"
    yield "Trace", f"{found.trace:.4g} ± {found.trace_error:.2g} (standard error)"
    for moved in found.moved:
        figures = [
            f"{in_words(name)} {value:.4f} → {moved.metrics[name]:.4f}"
            for name, value in found.metrics.items()
        ]
        name = "Up the gradient" if moved.direction == "ascent" else "At random"
        yield f"{name}, {found.radius:g}", ", ".join(figures)


def _show_classes(console: Console, found: Evaluation) -> None:
    heads = ("class", "records", "precision", "recall", "F1")
    rows = [
        (
            row["class"],
            f"{row['records']:,}",
            *(_share(row[name]) for name in ("precision", "recall", "f1")),
        )
        for row in found.as_json()["classes"]
    ]
    show_line(console, "")
    show(console, Table(heads, rows, "<>>>>"))
    if len(found.classes) <= _MOST_CLASSES:
        matrix = [
            (name, *map(str, row)) for name, row in zip(found.classes, found.counts, strict=True)
        ]
        show_line(console, "")
        taken = ("class ↓, taken for →", *found.classes)
        show(console, Table(taken, matrix, "<" + ">" * len(found.classes)))


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
