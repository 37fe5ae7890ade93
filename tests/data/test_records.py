from __future__ import annotations

import pytest
import torch

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue


def _records() -> TensorRecords:
    return TensorRecords({"image": torch.arange(10.0).view(5, 2), "label": torch.arange(5)})


def test_batch_reads_positions_in_order_and_with_repeats() -> None:
    batch = _records().batch(torch.tensor([4, 0, 4]))

    assert batch["label"].tolist() == [4, 0, 4]
    assert batch["image"].tolist() == [[8.0, 9.0], [0.0, 1.0], [8.0, 9.0]]


def test_an_empty_batch_keeps_the_shape_of_a_record() -> None:
    batch = _records().batch(torch.tensor([], dtype=torch.int64))

    assert batch["image"].shape == (0, 2)


def test_writing_to_a_batch_leaves_the_records_alone() -> None:
    records = _records()
    records.batch(torch.arange(5))["image"].zero_()

    assert records.batch(torch.tensor([1]))["image"].tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("fields", [{}, {"image": torch.zeros(3), "label": torch.zeros(2)}])
def test_fields_must_be_there_and_equally_long(fields: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InvalidValue, match="tensors"):
        TensorRecords(fields)
