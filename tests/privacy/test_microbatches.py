from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.microbatches import microbatches
from fedlora_flwr.tasks.records import TensorRecords
from tests.models import ROBERTA, VIT

sizes = st.lists(st.integers(0, 512), max_size=60)
limits = st.none() | st.integers(1, 70)
costs = st.integers(0, 5000)


def cut(
    lengths: Sequence[int], largest: int | None = None, cost: int = 64
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the parts of a batch, as indices and as lengths."""
    # Indices are no positions in the batch.
    indices = torch.arange(len(lengths)) * 7 + 1000
    found = microbatches(indices, np.array(lengths, dtype=np.int64), largest, cost)
    places = [((part - 1000) // 7).tolist() for part in found]
    return [part.tolist() for part in found], [[lengths[i] for i in part] for part in places]


def padded(parts: Sequence[Sequence[int]]) -> int:
    return sum(len(part) * max(part, default=0) for part in parts)


@given(sizes, limits, costs)
def test_each_index_is_in_one_part(lengths: list[int], largest: int | None, cost: int) -> None:
    parts, _ = cut(lengths, largest, cost)

    assert sorted(index for part in parts for index in part) == [
        1000 + 7 * i for i in range(len(lengths))
    ]
    assert all(parts) or parts == [[]]
    assert largest is None or all(len(part) <= largest for part in parts)


@given(sizes, costs)
def test_every_cut_saves_more_padding_than_a_pass_costs(lengths: list[int], cost: int) -> None:
    _, parts = cut(lengths, None, cost)

    assert padded(parts) <= padded([lengths]) - (cost + 1) * (len(parts) - 1)
    joined = [length for part in parts for length in part]
    assert joined == sorted(lengths)


@given(sizes, limits, costs)
def test_a_limit_adds_no_padding(lengths: list[int], largest: int | None, cost: int) -> None:
    assert padded(cut(lengths, largest, cost)[1]) <= padded(cut(lengths, None, cost)[1])


@given(sizes, costs)
def test_no_cut_in_two_that_pays_is_left(lengths: list[int], cost: int) -> None:
    for part in cut(lengths, None, cost)[1]:
        for place in range(1, len(part)):
            assert padded([part]) - padded([part[:place], part[place:]]) <= cost


@given(st.integers(0, 40), limits)
def test_without_lengths_the_order_is_kept(count: int, largest: int | None) -> None:
    indices = torch.arange(count).flip(0)
    parts = microbatches(indices, None, largest)
    assert torch.equal(torch.cat(parts), indices)
    assert {len(part) for part in parts[:-1]} <= {largest}
    assert len(parts) == max(1, -(-count // (largest or max(count, 1))))


def test_records_of_one_length_are_not_cut_and_keep_their_order() -> None:
    parts, _ = cut([9] * 30, None, 0)
    assert parts == [[1000 + 7 * i for i in range(30)]]


def test_a_cut_by_hand() -> None:
    # A cut behind the 1s saves 3 * 9 tokens, which pays at 26 and not at 27.
    lengths = [10, 1, 10, 1, 1]
    assert cut(lengths, None, 26)[1] == [[1, 1, 1], [10, 10]]
    assert cut(lengths, None, 27)[1] == [[1, 1, 1, 10, 10]]
    assert cut(lengths, 2, 26)[1] == [[1, 1], [1], [10, 10]]
    assert cut(lengths, None, 26)[0] == [[1007, 1021, 1028], [1000, 1014]]


class Lengthy(TensorRecords):
    """Records that say how long they are."""

    lengths: NDArray[np.int64]


@pytest.mark.parametrize(("microbatch", "sizes"), [(None, [4, 3]), (2, [2, 2, 2, 1])])
def test_the_engine_cuts_by_the_lengths_of_the_batch(
    microbatch: int | None, sizes: list[int]
) -> None:
    tensors = ROBERTA.records(9)
    records = Lengthy(tensors.batch(torch.arange(9)))
    # Of the whole data set; the batch is another order of some.
    records.lengths = np.array([1000, 1, 90, 1, 90, 1, 90, 1, 1000])
    engine = PrivateEngine(ROBERTA.adapted(), ROBERTA.losses, microbatch)

    parts = engine._chunks(records, torch.tensor([2, 1, 6, 5, 4, 7, 3]))

    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).tolist() == [1, 5, 7, 3, 2, 6, 4]


def test_records_without_lengths_are_cut_by_number_only() -> None:
    engine = PrivateEngine(VIT.adapted(), VIT.losses, 3)
    indices: Tensor = torch.tensor([5, 0, 2, 4])
    assert [part.tolist() for part in engine._chunks(VIT.records(6), indices)] == [[5, 0, 2], [4]]
