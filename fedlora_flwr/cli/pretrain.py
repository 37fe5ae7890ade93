"""``fedlora pretrain``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.errors import require
from fedlora_flwr.terminal import show_lines


def pretrain(
    source: Annotated[
        str, typer.Argument(help="Tiny-ImageNet: files, a folder, or its name on the hub.")
    ],
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the pictures.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Pretrain the small Swin on classes 0 to 99, for `model = "small-swin"`."""
    require("client", "vision")
    from fedlora_flwr.backbones.pretrain_swin import SwinRecipe, pretrain_swin
    from fedlora_flwr.lora.build import resolve_device

    chosen = SwinRecipe(seed=seed) if epochs is None else SwinRecipe(seed=seed, epochs=epochs)
    console = Console()
    folder = pretrain_swin(source, chosen, device=resolve_device(device), console=console)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    reached = f"{card['accuracy']:.1%} on valid after {card['seconds'] / 60:.0f} minutes"
    show_lines(console, [("Accuracy", reached), ("Model", str(folder))])
