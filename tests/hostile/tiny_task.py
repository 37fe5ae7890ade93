"""A device's own task: a model of a few hundred weights, and records that count their readers.

It is named in the device's file as ``task = "tests.hostile.tiny_task:make"``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records

FEATURES, CLASSES, RECORDS = 8, 3, 16
NAME = "tests.hostile.tiny_task:make"


@dataclass
class Reads:
    """What was read of private and of public records, in this process."""

    opened: int = 0
    batches: int = 0
    public: int = 0
    since_opened: int = 0
    on_batch: list[Callable[[], None]] = field(default_factory=list)
    """Called before each private batch."""


READS = Reads()


class CountedRecords:
    """Records in memory that tell when they are read."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def batch(self, indices: Tensor) -> Batch:
        READS.batches += 1
        for call in READS.on_batch:
            call()
        rows = self._table[indices]
        return {"x": rows[:, :-2], "label": rows[:, -2].long(), "weight": rows[:, -1]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + torch.tanh(self.fc(x))
        return found


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(x))
        return found


class TinyTask:
    """Classify points; ``dataset`` is the .npy file of the private ones."""

    name = "tiny"
    metric = "accuracy"
    lora_targets = r"blocks\.\d+\.fc"
    head: tuple[str, ...] = ("head",)
    model: Callable[[], nn.Module] = TinyModel

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return type(self).model()

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        READS.opened += 1
        return CountedRecords(torch.from_numpy(np.load(self._settings.dataset)))

    def test_records(self) -> Records:
        READS.public += 1
        file = Path(self._settings.dataset).with_name(f"{self._settings.test_split}.npy")
        return _Public(torch.from_numpy(np.load(file)))

    def check_splits_apart(self) -> None:
        """Compare the splits, as a device asks of its own task before it evaluates."""
        folder = Path(self._settings.dataset).parent
        private = np.load(self._settings.dataset)
        public = np.load(folder / f"{self._settings.test_split}.npy")
        if {row.tobytes() for row in private} & {row.tobytes() for row in public}:
            raise ValueError("a public record is private")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        found = F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")
        return found * batch["weight"]

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        batch = records.batch(torch.arange(len(records)))
        with torch.inference_mode():
            logits = model(batch["x"])
        hits = (logits.argmax(1) == batch["label"]).double().mean()
        return {"loss": self.losses(model, batch).mean().item(), "accuracy": hits.item()}


class _Public(CountedRecords):
    def batch(self, indices: Tensor) -> Batch:
        rows = self._table[indices]
        return {"x": rows[:, :-2], "label": rows[:, -2].long(), "weight": rows[:, -1]}


make = TinyTask


def points(seed: int, count: int = RECORDS) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return points with their classes and weights of 1, shape (count, FEATURES + 2)."""
    draw = np.random.default_rng(seed)
    table = draw.normal(size=(count, FEATURES + 2)).astype(np.float32)
    table[:, -2] = draw.integers(CLASSES, size=count)
    table[:, -1] = 1
    return table
