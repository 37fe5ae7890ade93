"""Folders of small pictures of all modes, one class a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedlora_flwr.config import RunConfig

CLASSES = ("ant", "bee", "cat")
MODES = ("RGB", "L", "RGBA", "P")
# What timm would say of a model for pictures of 4 by 4, so that nothing of that size is resized.
SIZE = {
    "input_size": (3, 4, 4),
    "interpolation": "nearest",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (40, 52)) -> Image.Image:
    """Return a picture whose left half is brighter the higher its class, ``number`` modulo 3."""
    draw = np.random.default_rng(number)
    values = draw.integers(0, 60, (*size, 4), dtype=np.uint8)
    values[..., 3] = 255 - values[..., 3]
    values[:, : size[1] // 2, :3] += np.uint8(60 * (number % len(CLASSES)))
    return Image.fromarray(values).convert(mode)


def write_pictures(folder: Path, train: int = 24, valid: int = 9, modes: Any = MODES) -> Path:
    """Write splits ``train`` and ``valid`` of class folders."""
    for split, count, first in (("train", train, 0), ("valid", valid, 300)):
        for number in range(count):
            place = folder / split / CLASSES[number % len(CLASSES)]
            place.mkdir(parents=True, exist_ok=True)
            made = picture(first + number, modes[number // len(CLASSES) % len(modes)])
            made.save(place / f"{number:04d}.png")
    return folder


def image_config(folder: Path, /, **changes: Any) -> RunConfig:
    """Return a configuration of image classification on a transformer of 300,000 parameters."""
    usual = {
        "task": "image-classification",
        "model": "test_vit",
        "weights": "random",
        "image-size": 32,
        "dataset": str(folder),
        "test-split": "valid",
        "partitioner": "iid",
        "min-records": 1,
        "num-clients": 3,
        "device": "cpu",
        "reproducible": True,
    }
    return RunConfig.of(usual, {key.replace("_", "-"): value for key, value in changes.items()})
