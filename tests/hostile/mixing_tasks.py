"""Tasks that a device's owner might name by mistake: models that mix records, records that fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.errors import OrderRefused
from tests.hostile.tiny_task import CLASSES, FEATURES, READS, Block, CountedRecords, TinyTask

CANARY = "qzjxkvwpyh"


class OwnNorm(nn.Module):
    """Batch normalization of the user's own: no class of torch's gives it away."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("var", torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        return (x - mean) / (var + 1e-3).sqrt()


class RunningNorm(OwnNorm):
    """Normalization by running statistics, which one record's batch changes for the next."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return x - self.mean


class Mixup(nn.Module):
    """Adds the record before to each."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 0) if self.training else x


class Router(nn.Module):
    """Lets the largest records through, as a mixture of experts of limited capacity does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        best = x.sum(1).topk(max(1, len(x) // 2)).indices
        passed = torch.zeros(len(x), 1).index_fill(0, best, 1.0)
        return x * passed


class EvoNorm(nn.Module):
    """timm's EvoNorm2dB0 on tiny pictures: batch statistics in training mode."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers.evo_norm import EvoNorm2dB0

        self.norm = EvoNorm2dB0(FEATURES // 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x.reshape(len(x), -1, 2, 2)).flatten(1)
        return found


def _model(layer: type[nn.Module]) -> Any:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())
            self.mixing = layer()
            self.head = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.blocks(self.mixing(x)))
            return found

    return Mixing


def _task(layer: type[nn.Module]) -> type[TinyTask]:
    return type(f"{layer.__name__}Task", (TinyTask,), {"model": staticmethod(_model(layer))})


own_norm, running_norm, mixup = _task(OwnNorm), _task(RunningNorm), _task(Mixup)
router, evo_norm = _task(Router), _task(EvoNorm)


class FailingRecords(CountedRecords):
    """Records that fail once they have been read for a while, and say of what."""

    after = 0
    error: type[BaseException] = ValueError

    def batch(self, indices: Tensor) -> Batch:
        found = super().batch(indices)
        READS.since_opened += 1
        if READS.since_opened > self.after:
            raise self.error(f"{CANARY}: {found['x'].tolist()}")
        return found


class FailingTask(TinyTask):
    """Opens records that fail at their first batch, or later."""

    after = 0
    error: type[BaseException] = ValueError

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        found = super().client_records(partition_id, num_partitions)
        READS.since_opened = 0
        failing = FailingRecords(found._table)  # type: ignore[attr-defined]
        failing.after, failing.error = self.after, self.error
        return failing


class Panic(BaseException):
    """What a panic of a library in Rust becomes: the base of it is not Exception."""


def panicking(settings: Any) -> FailingTask:
    task = FailingTask(settings)
    task.error = Panic
    return task


def refusing(settings: Any) -> FailingTask:
    """Make a task that raises what may travel, when it is too late for that."""
    task = FailingTask(settings)
    task.error = OrderRefused
    return task


def refusing_at_once(settings: Any) -> FailingTask:
    """Read records before anybody asks for them, and tell them as a refusal."""
    raise OrderRefused(f"{CANARY}: {settings.dataset}")


class UnreadableTask(TinyTask):
    """Cannot open its records, and says why with their content."""

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        READS.opened += 1
        raise ValueError(f"no number: {CANARY}")


def failing(settings: Any) -> FailingTask:
    return FailingTask(settings)


def failing_later(settings: Any) -> FailingTask:
    task = FailingTask(settings)
    task.after = (
        4  # Within the first step of a process, which checks the model, and in the fifth after.
    )
    return task


unreadable = UnreadableTask
