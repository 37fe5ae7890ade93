"""``fedlora pretrain`` and ``fedlora bench``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson
from fedlora_flwr.terminal import show_json, show_lines


def pretrain(
    source: Annotated[
        str, typer.Argument(help="Tiny-ImageNet: files, a folder, or its name on the hub.")
    ],
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the pictures.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Pretrain the small Swin on classes 0 to 99, for `model = "small-swin"`."""
    from fedlora_flwr.backbones.pretrain_swin import SwinRecipe, pretrain_swin
    from fedlora_flwr.lora.build import resolve_device

    chosen = SwinRecipe(seed=seed) if epochs is None else SwinRecipe(seed=seed, epochs=epochs)
    console = Console()
    folder = pretrain_swin(source, chosen, device=resolve_device(device), console=console)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    reached = f"{card['accuracy']:.1%} on valid after {card['seconds'] / 60:.0f} minutes"
    show_lines(console, [("Accuracy", reached), ("Model", str(folder))])


def complete_benchmark(incomplete: str) -> list[str]:
    """Return the benchmarks that begin so."""
    from fedlora_flwr.bench.suite import BENCHMARKS

    return [name for name in BENCHMARKS if name.startswith(incomplete)]


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Benchmarks; those with bars for simulations if none.",
            autocompletion=complete_benchmark,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory here, as ratios to what you would have otherwise."""
    # The profiler, which weighs memory, else writes a line for each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from fedlora_flwr.bench.suite import run_suite

    found = run_suite(names or [], output and output.resolve(), Console(stderr=as_json))
    if as_json:
        show_json({name: [figure.as_dict() for figure in made] for name, made in found.items()})
