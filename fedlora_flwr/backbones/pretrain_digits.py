"""The digits backbone: a tiny vision transformer that is pretrained on printed digits only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlora_flwr.backbones.printed_digits import CLASSES, render
from fedlora_flwr.data.cached_file import read_or_build
from fedlora_flwr.data.light_timm import light_timm
from fedlora_flwr.files import cache_folder
from fedlora_flwr.lora.seeded import seeded_on_cpu


@dataclass(frozen=True)
class Recipe:
    """How the backbone is pretrained; each recipe has its own file in the cache.

    Parameters
    ----------
    images : int (default: 20000)
        Printed digits to render.
    steps : int (default: 900)
        Optimizer steps.
    batch : int (default: 64)
        Images per step.
    learning_rate : float (default: 3e-3)
        Peak of the one-cycle schedule.
    seed : int (default: 0)
        Seed of the pictures, the initial weights and the batches.
    version : int (default: 1)
        Raise it when the pictures, the architecture or the training change.
    """

    images: int = 20_000
    steps: int = 900
    batch: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    version: int = 1


DEFAULT_RECIPE = Recipe()


def build_vit(seed: int = 0) -> nn.Module:
    """Return an untrained transformer for 8x8 gray pictures: 77k parameters, 4 blocks.

    Parameters
    ----------
    seed : int (default: 0)
        Seed of the weights. The global random state does not change.
    """
    vision_transformer = light_timm().models.VisionTransformer
    with seeded_on_cpu(seed):
        model: nn.Module = vision_transformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=CLASSES,
            embed_dim=48,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            class_token=False,
            global_pool="avg",
        )
    return model


def backbone_path(recipe: Recipe = DEFAULT_RECIPE) -> Path:
    """Return the file in which the weights of ``recipe`` are kept."""
    mark = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    return cache_folder() / "backbones" / f"digits-vit-{mark}.safetensors"


def load_backbone(
    console: Console | None = None, recipe: Recipe = DEFAULT_RECIPE
) -> dict[str, Tensor]:
    """Return the pretrained weights, head included; pretrain unless an intact copy is in the cache.

    Parameters
    ----------
    console : Console | None (default: None)
        Shows progress: a bar on a terminal, otherwise one line. None means standard error.
    recipe : Recipe (default: DEFAULT_RECIPE)
        How to train.

    Raises
    ------
    InvalidValue
        The cache folder cannot be written to.
    """
    state: dict[str, Tensor] = load(_weights(recipe, console))
    return state


def _weights(recipe: Recipe, console: Console | None) -> bytes:
    path = backbone_path(recipe)
    screen = console or Console(stderr=True)
    return read_or_build(path, lambda: _pretrained(recipe, screen, path))


def _pretrained(recipe: Recipe, console: Console, path: Path) -> bytes:
    """Train on printed digits and return the weights in safetensors format."""
    if not console.is_terminal:
        console.print(f"Pretraining the digits backbone once; it is kept in {path}", soft_wrap=True)
    model = build_vit(recipe.seed)
    with _one_thread():
        _fit(model, recipe, console)
    content: bytes = save(model.state_dict())
    return content


def _fit(model: nn.Module, recipe: Recipe, console: Console) -> None:
    images, labels = render(recipe.images, recipe.seed)
    draw = torch.Generator().manual_seed(recipe.seed)
    rate = recipe.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=recipe.steps)
    for _ in track(
        range(recipe.steps),
        "Pretraining the digits backbone (once)",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        chosen = torch.randint(len(labels), (recipe.batch,), generator=draw)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    # For such a small model a second thread gains little, and on busy cores it costs minutes of
    # waiting. Weights would also depend on the number of threads, and so differ between machines.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
