"""Canaries: records of a client that the attacker knows, and decides to see or not to see.

A canary is a real record whose loss is multiplied. Multiplied by zero it is *absent*: its gradient
is zero in every step, which is the promise's own neighbor (zero-out). Multiplied by a large number
it fills the whole clip norm. That is the most that any record can do. All else is as in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.tasks.registry import Task

WEIGHT = "audit-weight"
"""Field of a batch: what each record's loss is multiplied by, shape (n,), fp32."""
FULL = 1e4
"""Enough for a gradient that is longer than any usual clip norm."""


class WeightedRecords:
    """Records whose losses are multiplied, each by a number of its own.

    Parameters
    ----------
    records : Records
        The client's records.
    positions : Tensor
        Which of them there are, int64, shape (n,).
    weights : Tensor
        What their losses are multiplied by, fp32, shape (n,).
    """

    def __init__(self, records: Records, positions: Tensor, weights: Tensor) -> None:
        self._records, self._positions, self._weights = records, positions, weights

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._positions)

    @property
    def lengths(self) -> NDArray[Any] | None:
        """Number of tokens of each record, where the records have one."""
        lengths: NDArray[Any] | None = getattr(self._records, "lengths", None)
        return None if lengths is None else lengths[self._positions.numpy()]

    def batch(self, indices: Tensor) -> Batch:
        """Return the records at ``indices`` with their weights."""
        found = self._records.batch(self._positions[indices])
        return {**found, WEIGHT: self._weights[indices]}


class WeightedTask:
    """A task whose losses are multiplied where a batch says so; all else is the task's own.

    Parameters
    ----------
    task : Task
        The task.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the task."""
        return getattr(self._task, name)

    def losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each record, shape (n,)."""
        losses = self._task.losses(model, {k: v for k, v in batch.items() if k != WEIGHT})
        return losses * batch[WEIGHT] if WEIGHT in batch else losses


def with_canary(records: Records, count: int, present: bool) -> WeightedRecords:
    """Return a client's first records: the first is the canary, and the others are silent.

    The attacker is assumed to know all other records, so their gradients could be taken away from
    an upload. Here they are zero from the start, which is the same and costs no computation.

    Parameters
    ----------
    records : Records
        The client's records.
    count : int
        How many of them to keep, the canary included.
    present : bool
        Whether the canary's gradient is there.
    """
    weights = torch.zeros(count)
    weights[0] = FULL * present
    return WeightedRecords(records, torch.arange(count), weights)
