"""The small Swin: a backbone for 32x32 pictures, pretrained on public pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from fedlora_flwr.backbones.image_models import SMALL_SWIN, data_config, model_folder
from fedlora_flwr.data.arrow_records import ArrowRecords
from fedlora_flwr.data.cached_file import require_writable
from fedlora_flwr.data.light_timm import light_timm
from fedlora_flwr.data.pictures import collate, image_column, normalized, pixels
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import replacing

if TYPE_CHECKING:
    from datasets import Dataset

ARCHITECTURE = "swin_tiny_patch4_window7_224"
# Windows of 4 on grids of 8, 4 and 2: 5.1 million parameters.
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 96,
    "depths": (2, 2, 2),
    "num_heads": (3, 6, 12),
}
_PADDING = 4


@dataclass(frozen=True)
class SwinRecipe:
    """How the small Swin is pretrained.

    Parameters
    ----------
    classes : int (default: 100)
        Classes 0 to ``classes - 1`` are trained on; the others stay unseen.
    epochs : int (default: 40)
        Passes over the pictures.
    batch : int (default: 128)
        Pictures per step.
    learning_rate : float (default: 1e-3)
        Peak of AdamW's one-cycle schedule.
    weight_decay : float (default: 0.05)
        AdamW's weight decay.
    drop_path : float (default: 0.1)
        Probability with which a block is skipped.
    seed : int (default: 0)
        Seed of weights, order and augmentation.
    """

    classes: int = 100
    epochs: int = 40
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    drop_path: float = 0.1
    seed: int = 0


def pretrain_swin(
    source: str,
    recipe: SwinRecipe | None = None,
    *,
    device: torch.device | None = None,
    console: Console | None = None,
) -> Path:
    """Train the small Swin and save it where ``model = "small-swin"`` finds it.

    Parameters
    ----------
    source : str
        Tiny-ImageNet or another set of labeled pictures with splits ``train`` and ``valid``, as
        for `load_split`.
    recipe : SwinRecipe, optional
        The defaults if not given.
    device : torch.device, optional
        The CPU if not given.
    console : Console, optional
        Shows progress; standard error if not given.

    Returns
    -------
    Path
        The folder: ``config.json`` and ``model.safetensors`` as timm reads them, and ``card.json``
        with the accuracy on ``valid``, the seconds, the machine and the recipe.

    Raises
    ------
    InvalidValue
        The pictures cannot be read, a class has no picture, or the cache folder cannot be written
        to.
    """
    recipe, console = recipe or SwinRecipe(), console or Console(stderr=True)
    device = device or torch.device("cpu")
    require_writable(model_folder(SMALL_SWIN).parent)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = build_swin(recipe.classes, recipe.drop_path)
        data = data_config(model, 0)
        train = _records(source, "train", recipe.classes, data)
        valid = _records(source, "valid", recipe.classes, data)
        model.to(device)
        _fit(model, train, valid, recipe, data, console)
    accuracy = _accuracy(model, valid, data)
    card = {
        "model": SMALL_SWIN,
        "parameters": sum(p.numel() for p in model.parameters()),
        "records": len(train),
        "accuracy": accuracy,
        "seconds": time.perf_counter() - started,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}",
        "torch": torch.__version__,
        "recipe": asdict(recipe),
    }
    return _keep(model, card)


def build_swin(num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """Return an untrained small Swin; the global generator draws its weights."""
    made: nn.Module = light_timm().create_model(
        ARCHITECTURE,
        pretrained=False,
        num_classes=num_classes,
        drop_path_rate=drop_path,
        pretrained_cfg_overlay={"input_size": (3, 32, 32), "crop_pct": 1.0},
        **MODEL_ARGS,
    )
    return made


def _records(source: str, split: str, classes: int, data: dict[str, Any]) -> ArrowRecords:
    dataset = load_split(source, split)
    if "label" not in dataset.features:
        raise InvalidValue("source", source, "pictures with a column 'label' of whole numbers")
    labels = np.asarray(dataset["label"][:])
    if missing := sorted(set(range(classes)) - set(labels.tolist())):
        allowed = f"pictures of classes 0 to {classes - 1}; {split!r} has none of {missing[:5]}"
        raise InvalidValue("source", source, allowed)
    rows = np.flatnonzero((labels >= 0) & (labels < classes))
    chosen: Dataset = dataset.select(rows)
    prepared = pixels(chosen, image_column(chosen, ""), data)
    return ArrowRecords(prepared.add_column("label", labels[rows]), collate)


def _fit(
    model: nn.Module,
    train: ArrowRecords,
    valid: ArrowRecords,
    recipe: SwinRecipe,
    data: dict[str, Any],
    console: Console,
) -> None:
    draw = torch.Generator().manual_seed(recipe.seed)
    everything = train.batch(torch.arange(len(train)))
    images, labels = everything["image"], everything["label"]
    steps = max(len(labels) // recipe.batch, 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps, pct_start=0.15
    )
    device = next(model.parameters()).device
    report = _reporter(console, model, valid, data)
    model.train()
    for step in track(
        range(recipe.epochs * steps),
        "Pretraining the small Swin (once)",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        if step % steps == 0:
            order = torch.randperm(len(labels), generator=draw)
            if step:
                report(step // steps, recipe.epochs)
        chosen = order[(step % steps) * recipe.batch :][: recipe.batch]
        pictures = normalized(augmented(images[chosen], draw).to(device), data)
        loss = F.cross_entropy(model(pictures), labels[chosen].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror half of the pictures, and move each by up to 4 pixels.

    Parameters
    ----------
    images : Tensor
        Shape (n, channels, h, w).
    draw : torch.Generator
        Source of the draws.

    Returns
    -------
    Tensor
        New pictures of the same shape. Pixels that a move uncovers repeat the edge.
    """
    n, _, height, width = images.shape
    mirrored = torch.rand(n, generator=draw) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    moves = torch.randint(-_PADDING, _PADDING + 1, (2, n, 1), generator=draw)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
    at = torch.arange(n).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _reporter(
    console: Console, model: nn.Module, valid: ArrowRecords, data: dict[str, Any]
) -> Callable[[int, int], None]:
    def report(epoch: int, epochs: int) -> None:
        # A measurement costs about a fifth of an epoch.
        if epoch % 5 == 0:
            accuracy = _accuracy(model, valid, data)
            console.print(f"Epoch {epoch} of {epochs}: {accuracy:.1%} on valid", highlight=False)
            model.train()

    return report


def _accuracy(model: nn.Module, records: ArrowRecords, data: dict[str, Any]) -> float:
    model.eval()
    device = next(model.parameters()).device
    hits = 0
    with torch.inference_mode():
        for indices in torch.split(torch.arange(len(records)), 500):
            batch = records.batch(indices)
            scores = model(normalized(batch["image"].to(device), data))
            hits += int((scores.argmax(1).cpu() == batch["label"]).sum())
    return hits / len(records)


def _keep(model: nn.Module, card: dict[str, Any]) -> Path:
    """Write the folder atomically, replacing an earlier one."""
    from timm.models import save_for_hf

    folder = model_folder(SMALL_SWIN)
    with replacing(folder) as draft:
        save_for_hf(model.cpu(), str(draft), model_args=MODEL_ARGS, safe_serialization=True)
        (draft / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return folder
