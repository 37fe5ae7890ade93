"""Image classification on any timm model: ViT, Swin, DeiT and the like."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora_flwr.errors import unknown
from fedlora_flwr.tasks.arrow_records import ArrowRecords, Rows
from fedlora_flwr.tasks.classifier_task import ClassifierTask
from fedlora_flwr.tasks.dataset_task import names
from fedlora_flwr.tasks.image_models import (
    build,
    classifier_modules,
    data_config,
    skeleton,
    usual_layers,
)
from fedlora_flwr.tasks.prepared import prepare
from fedlora_flwr.tasks.registry import Batch

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


class ImageClassification(ClassifierTask):
    """Classify pictures.

    Batches are ``{"image": (n, channels, h, w) uint8, "label": (n,) int64}``: resized and cropped
    as timm's configuration of the model says, once; normalised on the model's device. Keys of the
    configuration: ``model`` (a timm name, or a folder of ``timm.models.save_for_hf``), ``weights``,
    ``dataset``, ``input-columns`` (the picture's; empty finds it), ``label-column``,
    ``image-size``.
    """

    name = "image-classification"

    @cached_property
    def lora_targets(self) -> str:
        """Attention's layers in timm's transformers; in other models those of the MLPs."""
        return usual_layers(self.skeleton())

    @cached_property
    def head(self) -> tuple[str, ...]:
        """The classifier, as timm names it."""
        return classifier_modules(self.skeleton())

    def build_model(self) -> nn.Module:
        """Return the pretrained model with a classifier whose start follows from the seed.

        Raises
        ------
        InvalidValue
            See `fedlora_flwr.tasks.image_models.build`.
        """
        return build(self._settings, self.num_classes)

    def skeleton(self, device: str = "meta") -> nn.Module:
        """Return the model without its weights; they are random but on ``"meta"``."""
        return skeleton(self._settings, self.num_classes, device)

    def largest_batch(self, records: int) -> Batch:
        """Return pictures of the model's size."""
        return {
            "image": torch.zeros((records, *self._data["input_size"]), dtype=torch.uint8),
            "label": torch.zeros(records, dtype=torch.int64),
        }

    def made_up_batch(self, records: int) -> Batch:
        """Return pictures of random pixels, all of the first class."""
        generator, batch = torch.Generator().manual_seed(0), self.largest_batch(records)
        pixels = torch.randint(256, batch["image"].shape, generator=generator, dtype=torch.uint8)
        return {**batch, "image": pixels}

    @cached_property
    def _data(self) -> dict[str, Any]:
        return data_config(self.skeleton(), self._settings.image_size)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(normalised(batch["image"], self._data))
        return found.float()

    def _input_columns(self, dataset: Dataset) -> list[str]:
        return [image_column(dataset, self._settings.input_columns)]

    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        (column,) = self._input_columns(dataset)
        prepared = pixels(dataset, column, self._data)
        return ArrowRecords(self._with_classes(prepared, dataset, training=training), collate)


def pixels(dataset: Dataset, column: str, data: Mapping[str, Any]) -> Dataset:
    """Return pictures at a model's size, made once per machine.

    Parameters
    ----------
    dataset : Dataset
        The pictures.
    column : str
        Their column.
    data : Mapping[str, Any]
        As of `fedlora_flwr.tasks.image_models.data_config`.

    Returns
    -------
    Dataset
        One column, ``image``: uint8 of shape (channels, h, w).
    """
    function = partial(_pixels, column=column, data=data)
    parts = {**data, "column": column}
    return prepare(dataset, function, parts, ["image"], packages=["timm", "pillow"])


def normalised(images: Tensor, data: Mapping[str, Any]) -> Tensor:
    """Scale uint8 pictures, shape (n, channels, h, w), to what the model was trained on."""
    mean = torch.tensor(data["mean"], device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(data["std"], device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - mean) / std


def image_column(dataset: Dataset, chosen: str) -> str:
    """Return the column of pictures.

    Raises
    ------
    InvalidValue
        The named column holds none, or there is not exactly one to choose.
    """
    import datasets

    found = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    wanted = names(chosen) or tuple(found)
    if len(wanted) != 1 or wanted[0] not in found:
        raise unknown("input-columns", chosen, found, before="a column of pictures, ")
    return wanted[0]


def _pixels(rows: dict[str, list[Any]], *, column: str, data: Mapping[str, Any]) -> dict[str, Any]:
    from timm.data import create_transform

    # With the prefetcher's setting, timm leaves scaling and normalising to the device.
    transform = create_transform(**data, is_training=False, use_prefetcher=True)
    mode = "L" if data["input_size"][0] == 1 else "RGB"
    images = [transform(_opaque(picture).convert(mode)) for picture in rows[column]]
    return {"image": np.stack(images)}


def _opaque(picture: Image) -> Image:
    """Return a picture whose palette is opaque; of others Pillow drops the transparency itself."""
    return picture.convert("RGBA") if "transparency" in picture.info else picture


def collate(rows: Rows) -> dict[str, Tensor]:
    """Make a batch of pictures and numbers."""
    return {
        name: torch.tensor(values, dtype=torch.uint8 if name == "image" else torch.int64)
        for name, values in rows.items()
    }
