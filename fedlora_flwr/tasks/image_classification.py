"""Image classification on any timm model: ViT, Swin, DeiT and the like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.backbones.image_models import (
    build,
    classifier_modules,
    data_config,
    skeleton,
    usual_layers,
)
from fedlora_flwr.data.arrow_records import ArrowRecords
from fedlora_flwr.data.pictures import (
    collate,
    image_column,
    normalized,
    pixels,
    read,
    without_picture,
)
from fedlora_flwr.data.records import Batch
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.classifier_task import ClassifierTask

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


class ImageClassification(ClassifierTask):
    """Classify pictures.

    Batches are ``{"image": (n, channels, h, w) uint8, "label": (n,) int64}``. Pictures are resized
    and cropped once, as timm's configuration of the model says, and normalized on the model's
    device. Keys of the configuration: ``model`` (a timm name, or a folder of
    ``timm.models.save_for_hf``), ``weights``, ``dataset``, ``input-columns`` (the column of
    pictures; empty finds it), ``label-column``, ``image-size``.
    """

    name = "image-classification"

    @cached_property
    def lora_targets(self) -> str:
        """The attention layers of timm's transformers; in other models, the layers of the MLPs."""
        return usual_layers(self.skeleton())

    @cached_property
    def head(self) -> tuple[str, ...]:
        """The classifier, as timm names it."""
        return classifier_modules(self.skeleton())

    def build_model(self) -> nn.Module:
        """Return the pretrained model with a new classifier that is drawn from the seed.

        Raises
        ------
        InvalidValue
            See `fedlora_flwr.backbones.image_models.build`.
        """
        return build(self._settings, self.num_classes, self._settings.seed)

    def skeleton(self, device: str = "meta") -> nn.Module:
        """Return the model without a checkpoint: random weights, or only shapes on ``"meta"``."""
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

    def picture_field(self) -> str:
        """Return the field of a batch that holds pictures."""
        return "image"

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pictures as the model reads them, shape (n, channels, h, w), fp32.

        Raises
        ------
        ValueError
            A picture's range of values is not known.
        """
        return normalized(torch.from_numpy(read(images, self._data)), self._data)

    @cached_property
    def _data(self) -> dict[str, Any]:
        return data_config(self.skeleton(), self._settings.image_size)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(normalized(batch["image"], self._data))
        return found.float()

    def _input_columns(self, dataset: Dataset) -> list[str]:
        return [image_column(dataset, self._settings.input_columns)]

    def _lacking(self, dataset: Dataset) -> dict[str, NDArray[np.int64]]:
        (column,) = self._input_columns(dataset)
        return {**super()._lacking(dataset), **without_picture(dataset, column)}

    def _prepare(self, dataset: Dataset, *, training: bool) -> ArrowRecords:
        (column,) = self._input_columns(dataset)
        prepared = pixels(dataset, column, self._data)
        return ArrowRecords(self._with_classes(prepared, dataset, training=training), collate)

    def _unlabeled(self, dataset: Dataset) -> ArrowRecords:
        (column,) = self._input_columns(dataset)
        for reason, rows in without_picture(dataset, column).items():
            allowed = f"a picture in each record, but record {rows[0]} has {reason}. Take it out"
            raise InvalidValue("input-columns", column, allowed)
        return ArrowRecords(pixels(dataset, column, self._data), collate)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model as timm's ``local-dir:`` reads it.

        Parameters
        ----------
        model : nn.Module
            The model of `build_model`, with other weights.
        folder : Path
            The folder; it is made if missing.
        """
        from timm.models import save_for_hf

        config = {"num_classes": self.num_classes, "label_names": list(self.class_names())}
        save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
