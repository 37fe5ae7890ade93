"""What the tests of questions and of instructions share: words, tasks on rows, their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.tasks.dataset_task import DatasetTask
from tests.backbones import checkpoints

# 64 words; to the tiny checkpoints each is one token.
WORDS = [a + b + c + d for a in "bdkm" for b in "ao" for c in "lnrs" for d in "iu"]

Row = dict[str, Any]
_Task = TypeVar("_Task", bound=DatasetTask)


def make_task(
    kind: Callable[[Any], _Task], folder: Path, rows: Sequence[Row], model: Path, **changes: object
) -> _Task:
    """Write records as both splits and make the task on them."""
    for split in ("train", "validation"):
        checkpoints.write_split(folder, split, rows)
    usual = {
        "model": str(model),
        "dataset": str(folder),
        "partitioner": "iid",
        "min-records": 1,
        "max-length": 48,
    }
    dashed = {key.replace("_", "-"): value for key, value in changes.items()}
    return kind(RunConfig.of(usual, dashed))


def all_records(task: DatasetTask, training: bool = True) -> list[dict[str, Tensor]]:
    """Return each private or public record, as a batch of its own."""
    records = task.client_records(0, 1) if training else task.test_records()
    return [records.batch(torch.tensor([i])) for i in range(len(records))]


def fill(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give adapters values at which no gradient is zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
