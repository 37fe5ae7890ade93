"""Tasks with random records and models with random weights, only for measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import Shape
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.lora.seeded import seeded


class ShapeTask(ABC):
    """A task on one of the benchmarks' models; every client has the same 64 records.

    Parameters
    ----------
    settings : RunConfig
        The run.
    """

    name = "shape"
    metric = "loss"

    def __init__(self, settings: Any) -> None:
        self._shape = self.shape()
        self._records = TensorRecords(self._shape.batch(64))
        self.lora_targets = next(iter(self._shape.targets.values()))
        self.head = (self._shape.head,)

    @abstractmethod
    def shape(self) -> Shape:
        """Return the model and its input."""

    def build_model(self) -> nn.Module:
        """Return the model with random weights, the same in every process."""
        with seeded(0):
            return self._shape.build()

    def client_records(self, partition_id: int, num_partitions: int) -> TensorRecords:
        """Return all records."""
        return self._records

    def test_records(self) -> TensorRecords:
        """Return the same records."""
        return self._records

    def losses(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return one loss per record."""
        return self._shape.losses(model, batch)

    def evaluate(self, model: Any, records: TensorRecords) -> dict[str, float]:
        """Return the loss on one record. Its value does not matter here."""
        device = next(model.parameters()).device
        batch = {name: t.to(device) for name, t in records.batch(torch.arange(1)).items()}
        with torch.inference_mode():
            return {"loss": float(self._shape.losses(model, batch).mean())}


def layers(name: str, width: int, depth: int) -> Shape:
    """Return a classifier of two classes whose body is a number of square linear layers."""

    def build() -> nn.Module:
        body = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        return nn.ModuleDict({"body": body, "head": nn.Linear(width, 2)})

    def batch(count: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {"x": torch.randn(count, width, generator=draw), "label": torch.arange(count) % 2}

    def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        scores = model.head(model.body(batch["x"]))
        return F.cross_entropy(scores, batch["label"], reduction="none")

    return Shape(name, build, batch, losses, {"all": r"body\.\d+"}, "head")
