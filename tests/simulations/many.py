"""A task of which every client has the same four records, however many clients there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.tasks.table_task import TableClassifier, TableTask
from tests.simulations.tables import table

TABLE = TableTask(
    nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), train=table(16), test=table(16),
    lora_targets="0", head=("1",), columns=tuple("abcd"),
)  # fmt: skip


class Alike(TableClassifier):
    """Opens no records of its own for a client."""

    def __init__(self, settings: Any) -> None:
        super().__init__(TABLE, settings)

    def client_records(self, partition_id: int, num_partitions: int) -> TensorRecords:
        return TensorRecords(self._private.batch(torch.arange(4)))

    def client_units(self, num_partitions: int) -> NDArray[np.int64]:
        return np.full(num_partitions, 4)
