from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import (
    Array2D,
    ClassLabel,
    Dataset,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fedlora_flwr.data.arrow_records import ArrowRecords, pad_collate
from fedlora_flwr.data.records import Records
from fedlora_flwr.errors import InvalidValue

LISTS = [[7, 8, 9], [5], [], [1, 2, 3, 4], [6, 6]]
ROWS: dict[str, Any] = {
    "input_ids": LISTS,
    "attention_mask": [[1] * len(x) for x in LISTS],
    "labels": LISTS,
    "label": [0, 1, 2, 3, 4],
    "score": [0.5, 1.5, 2.5, 3.5, 4.5],
}


def dataset(chunks: int = 1) -> Dataset:
    """Return five records in one Arrow chunk, or in one chunk each."""
    if chunks == 1:
        return Dataset.from_dict(ROWS)
    one = Dataset.from_dict(ROWS)
    table = pa.concat_tables([one.data.table.slice(i, 1).combine_chunks() for i in range(5)])
    assert len(table.to_batches()) == 5
    return Dataset(table)


def positions(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize("chunks", [1, 5])
@given(st.lists(st.integers(0, 4), max_size=12))
def test_a_batch_is_its_rows_padded(chunks: int, asked: list[int]) -> None:
    records: Records = ArrowRecords(dataset(chunks), pad_collate())

    batch = records.batch(positions(*asked))

    width = max((len(LISTS[i]) for i in asked), default=0)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = [ROWS[name][i] + [fill] * (width - len(LISTS[i])) for i in asked]
        assert batch[name].tolist() == rows
        assert batch[name].shape == (len(asked), width)
        assert batch[name].dtype == torch.int64
    assert batch["label"].tolist() == asked
    assert batch["label"].dtype == torch.int64
    assert batch["score"].tolist() == [i + 0.5 for i in asked]


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_subset_is_a_view(chunks: int) -> None:
    records = ArrowRecords(dataset(chunks), pad_collate())
    part = records.subset(np.array([4, 0, 3])).subset(np.array([2, 0]))

    assert (len(records), len(part)) == (5, 2)
    assert part.batch(positions(1, 0))["label"].tolist() == [4, 3]
    assert part.values("label").tolist() == [3, 4]
    assert part._chunks is records._chunks
    assert len(records.subset(np.array([], dtype=np.int64))) == 0


def test_selections_of_a_data_set_are_kept() -> None:
    chosen = dataset().select([3, 1, 4]).shuffle(seed=3)
    records = ArrowRecords(chosen, pad_collate())
    assert records.batch(positions(0, 1, 2))["label"].tolist() == list(chosen["label"])
    joined = concatenate_datasets([dataset(), dataset().select([2])])
    assert ArrowRecords(joined, pad_collate()).batch(positions(5))["label"].tolist() == [2]
    assert len(ArrowRecords(dataset().select(range(1, 3)), pad_collate())) == 2


@pytest.mark.parametrize("wrong", [5, -1])
@pytest.mark.parametrize("chunks", [1, 5])
def test_positions_outside_are_refused(wrong: int, chunks: int) -> None:
    records = ArrowRecords(dataset(chunks), pad_collate())
    with pytest.raises(IndexError):
        records.batch(positions(0, wrong))
    with pytest.raises(IndexError):
        records.subset(np.array([0, 1])).batch(positions(2))


def test_columns_of_all_kinds_reach_collate_in_shape() -> None:
    seen: dict[str, Any] = {}

    def keep(rows: Any) -> dict[str, torch.Tensor]:
        seen.update(rows)
        return {}

    features = Features(
        {
            "fixed": List(List(Value("uint8"), length=2), length=3),
            "array": Array2D((2, 2), "float32"),
            "image": Image(),
            "class": ClassLabel(names=["a", "b"]),
            "text": Value("string"),
            "deep": List(List(Value("int64"))),
        }
    )
    gray = [Pillow.new("L", (4, 3), 10 * i) for i in range(3)]
    fixed = np.arange(18, dtype=np.uint8).reshape(3, 3, 2)
    rows = {
        "fixed": fixed.tolist(),
        "array": [[[i, 0], [0, i]] for i in range(3)],
        "image": gray,
        "class": [0, 1, 1],
        "text": ["x", "y", "z"],
        "deep": [[[1], []], [], [[2, 3]]],
    }
    ArrowRecords(Dataset.from_dict(rows, features=features), keep).batch(positions(2, 0))

    assert seen["fixed"].dtype == np.uint8
    np.testing.assert_array_equal(seen["fixed"], fixed[[2, 0]])
    np.testing.assert_array_equal(np.asarray(seen["array"])[:, 0, 0], [2, 0])
    assert [np.asarray(image)[0, 0] for image in seen["image"]] == [20, 0]
    assert seen["class"].tolist() == [1, 0]
    assert seen["text"] == ["z", "x"]
    assert seen["deep"] == [[[2, 3]], [[1], []]]


def test_widths_are_rounded_and_fillings_can_be_set() -> None:
    collate = pad_collate({"input_ids": 1}, multiple_of=8)
    batch = ArrowRecords(dataset(), collate).batch(positions(0, 3))
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1, 1, 1, 1, 1], [1, 2, 3, 4, 1, 1, 1, 1]]
    assert batch["labels"][1].tolist() == [1, 2, 3, 4, -100, -100, -100, -100]
    even = ArrowRecords(dataset(), pad_collate(multiple_of=4)).batch(positions(3))
    assert even["input_ids"].shape == (1, 4)


def test_a_batch_may_be_changed_without_harm() -> None:
    records = ArrowRecords(dataset(), pad_collate())
    batch = records.batch(positions(0, 1))
    batch["label"] += 10
    batch["input_ids"] += 10
    assert records.batch(positions(0, 1))["label"].tolist() == [0, 1]
    assert records.batch(positions(1))["input_ids"].tolist() == [[5]]


def test_what_cannot_be_padded_is_named() -> None:
    words = Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(InvalidValue, match="columns = 'text'"):
        ArrowRecords(words, pad_collate()).batch(positions(0))
    with pytest.raises(InvalidValue, match="multiple_of = 0"):
        pad_collate(multiple_of=0)
    with pytest.raises(InvalidValue, match="column = 'labels2'"):
        ArrowRecords(dataset(), pad_collate()).values("labels2")


@pytest.mark.parametrize("chunks", [1, 5])
def test_lengths_are_those_of_the_longest_list_of_each_record(chunks: int) -> None:
    longer = [[1] * n for n in (0, 4, 1, 2, 2)]
    whole = dataset(chunks).add_column("more", longer)
    records = ArrowRecords(whole, pad_collate())

    assert records.lengths is not None
    assert records.lengths.tolist() == [3, 4, 1, 4, 2]
    assert records.lengths.dtype == np.int64
    part = records.subset(np.array([4, 1, 1]))
    assert part.lengths is not None
    assert part.lengths.tolist() == [2, 4, 4]
    assert records.lengths.tolist() == [3, 4, 1, 4, 2]
    chosen = ArrowRecords(whole.select([3, 0]), pad_collate())
    assert chosen.lengths is not None
    assert chosen.lengths.tolist() == [4, 3]


def test_records_without_lists_of_numbers_have_no_lengths() -> None:
    features = Features({"picture": List(Value("uint8"), length=2), "class": Value("int64")})
    fixed = Dataset.from_dict({"picture": [[1, 2]], "class": [3]}, features=features)
    words = Dataset.from_dict({"words": [["a", "b"]], "text": ["ab"]})
    for other in (fixed, words, Dataset.from_dict({"x": []})):
        assert ArrowRecords(other, pad_collate()).lengths is None


def test_a_record_without_a_list_is_of_length_0() -> None:
    rows = {"input_ids": [[1, 2], None, []]}
    records = ArrowRecords(Dataset.from_dict(rows), pad_collate())
    assert records.lengths is not None
    assert records.lengths.tolist() == [2, 0, 0]
