"""Converts pictures to the numbers that a model reads: opaque, 8 bits, and of the model's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedlora_flwr.data.arrow_records import Rows
from fedlora_flwr.data.light_timm import light_timm
from fedlora_flwr.data.names import names
from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.errors import unknown

if TYPE_CHECKING:
    from datasets import Dataset

BACKGROUND = (255, 255, 255)
"""Transparent pixels are laid over this color: white."""
# The largest value of 16 bits, 65,535, is this many times that of 8 bits, 255.
_SCALE = 257


def pixels(dataset: Dataset, column: str, data: Mapping[str, Any]) -> Dataset:
    """Return pictures at a model's size. They are made once per machine.

    Parameters
    ----------
    dataset : Dataset
        The pictures.
    column : str
        Their column.
    data : Mapping[str, Any]
        The result of `fedlora_flwr.backbones.image_models.data_config`.

    Returns
    -------
    Dataset
        One column, ``image``: uint8 of shape (channels, h, w).
    """
    function = partial(_pixels, column=column, data=data)
    parts = {**data, "column": column}
    return prepare(dataset, function, parts, ["image"], packages=["timm", "pillow"])


def normalized(images: Tensor, data: Mapping[str, Any]) -> Tensor:
    """Scale uint8 pictures, shape (n, channels, h, w), to the range of the model's pretraining."""
    mean = torch.tensor(data["mean"], device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(data["std"], device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - mean) / std


def eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """Return a picture as models read it.

    16-bit gray is divided by 257, which maps its largest value to that of 8 bits. Transparent
    pixels are laid over white. Of several frames only the current one is used.

    Parameters
    ----------
    picture : Image
        A decoded picture in any mode of Pillow.
    mode : str
        ``"L"`` or ``"RGB"``.

    Raises
    ------
    ValueError
        Values are 32-bit integers or floating point numbers, of unknown range; or Pillow cannot
        convert the mode.
    """
    if picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "floating point numbers"
        raise ValueError(
            f"its values are {kind}, which have no known white. Save it with 8 or 16 bits"
        )
    if picture.mode.startswith("I;16"):
        picture = _scaled(picture)
    elif picture.mode == "LAB":  # Pillow cannot convert it directly to gray.
        picture = picture.convert("RGB")
    if picture.has_transparency_data:
        full = picture.convert("LA") if picture.mode == "La" else picture
        full = full.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", full.size, (*BACKGROUND, 255)), full)
    return picture.convert(mode)


def read(pictures: Sequence[Image.Image], data: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return decoded pictures at a model's size, shape (n, channels, h, w).

    Raises
    ------
    ValueError
        As `eight_bits`.
    """
    # With use_prefetcher, timm's transform does not scale or normalize pictures.
    transform = light_timm().data.create_transform(**data, is_training=False, use_prefetcher=True)
    mode = "L" if data["input_size"][0] == 1 else "RGB"
    return np.stack([transform(eight_bits(picture, mode)) for picture in pictures])


def _pixels(rows: dict[str, list[Any]], *, column: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": read(rows[column], data)}


def _scaled(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    gray = Image.fromarray(((values + _SCALE // 2) // _SCALE).astype(np.uint8))
    hidden = picture.info.get("transparency")
    if hidden is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.uint8(255) * (values != hidden))))


def image_column(dataset: Dataset, chosen: str) -> str:
    """Return the column of pictures.

    Raises
    ------
    InvalidValue
        The named column holds no pictures, or none is named and there is not exactly one.
    """
    import datasets

    found = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    wanted = names(chosen) or tuple(found)
    if len(wanted) != 1 or wanted[0] not in found:
        raise unknown("input-columns", chosen, found, before="a column of pictures, ")
    return wanted[0]


def without_picture(dataset: Dataset, column: str) -> dict[str, NDArray[np.int64]]:
    """Return the positions of the records without a picture, by the reason."""
    import pyarrow.compute as pc

    held = dataset.data.table.column(column)
    empty = [pc.is_null(pc.struct_field(held, part)) for part in ("bytes", "path")]
    missing = pc.or_(pc.is_null(held), pc.and_(*empty))
    if dataset._indices is not None:
        missing = missing.take(dataset._indices.column(0))
    rows = np.flatnonzero(missing.to_numpy())
    return {f"no picture in {column!r}": rows} if len(rows) else {}


def collate(rows: Rows) -> dict[str, Tensor]:
    """Make a batch of pictures and numbers."""
    return {
        name: torch.tensor(values, dtype=torch.uint8 if name == "image" else torch.int64)
        for name, values in rows.items()
    }
