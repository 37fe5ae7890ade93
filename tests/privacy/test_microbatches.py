from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.microbatches import PassPlan, microbatches, passes, width_step, widths_of
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import PLAIN_SGD, ROBERTA, VIT

keys = st.lists(st.integers(0, 6), max_size=60)
lengths_ = st.lists(st.integers(0, 600), min_size=1, max_size=40)
sizes = st.none() | st.integers(1, 70)
steps = st.integers(4, 64)
limits = st.none() | st.integers(1, 700)


@given(keys, sizes)
def test_each_position_is_in_one_part_and_a_part_has_one_key(
    values: list[int], largest: int | None
) -> None:
    parts = microbatches(np.array(values, dtype=np.int64), len(values), largest)

    found = [part.tolist() for part in parts]
    assert sorted(place for part in found for place in part) == list(range(len(values)))
    assert all(found) or found == [[]]
    assert all(len({values[place] for place in part}) == 1 for part in found if part)
    assert largest is None or all(len(part) <= largest for part in found)


@given(st.integers(0, 40), sizes)
def test_without_keys_the_order_is_kept(count: int, largest: int | None) -> None:
    parts = microbatches(None, count, largest)
    assert torch.cat(parts).tolist() == list(range(count))
    assert {len(part) for part in parts[:-1]} <= {largest}
    assert len(parts) == max(1, -(-count // (largest or max(count, 1))))


def test_parts_by_hand() -> None:
    parts = microbatches(np.array([3, 1, 3, 1, 1]), 5, 2)
    assert [part.tolist() for part in parts] == [[1, 3], [4], [0, 2]]


@given(lengths_, steps, limits, st.integers(0, 39))
def test_a_width_follows_from_a_records_own_length(
    lengths: list[int], step: int, limit: int | None, place: int
) -> None:
    together = np.array([min(n, limit or n) for n in lengths])
    own = together[[place % len(lengths)]]
    widths, keys = widths_of(together, step, limit)
    width, key = widths_of(own, step, limit)

    assert widths[place % len(lengths)] == width[0]
    assert keys[place % len(lengths)] == key[0]
    assert (widths >= together).all()
    # A mask that hides nothing is left out, and another computation done.
    assert all(len(set((together == widths)[keys == k])) == 1 for k in keys)
    assert limit is not None or (widths > together).all()


@pytest.mark.parametrize(("batch_size", "cost", "step"), [(64, 64, 8), (4, 64, 32), (4096, 64, 4)])
def test_widths_are_near_each_other_for_large_batches(
    batch_size: int, cost: int, step: int
) -> None:
    assert width_step(batch_size, cost) == step
    assert step <= width_step(batch_size, 4096) <= 64


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

    parts = parts_of(
        PrivateEngine(ROBERTA.adapted(), ROBERTA.losses, microbatch),
        records,
        torch.tensor([2, 1, 6, 5, 4, 7, 3]),
    )

    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).tolist() == [1, 5, 7, 3, 2, 6, 4]


def parts_of(engine: PrivateEngine, records: Any, indices: Tensor) -> list[Tensor]:
    engine.start_round(Mechanism(0.0, 1.0, 4, 9), PLAIN_SGD, SeededNoise(0))
    found = list(passes(records, indices, engine._plan))
    assert [part.is_last for part in found] == [False] * (len(found) - 1) + [True]
    assert all(part.rows == len(part.indices) for part in found)
    return [part.indices for part in found]


def test_records_without_lengths_are_cut_by_number_only() -> None:
    engine = PrivateEngine(VIT.adapted(), VIT.losses, 3)
    found = parts_of(engine, VIT.records(6), torch.tensor([5, 0, 2, 4]))
    assert [part.tolist() for part in found] == [[5, 0, 2], [4]]


class PaddedToTheLongest:
    """Records of a user's own, whose batches are as wide as their longest."""

    texts = (3, 5, 3, 8, 5, 1)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        chosen = [self.texts[i] for i in indices.tolist()]
        width = max(chosen)
        rows = torch.tensor(
            [[i] * n + [0] * (width - n) for i, n in zip(indices, chosen, strict=True)]
        )
        return {"input_ids": rows, "attention_mask": (rows >= 0).long()}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.booleans())
def test_records_that_say_nothing_are_put_together_by_the_shapes_they_have_alone(
    indices: Sequence[int], exact: bool
) -> None:
    records = PaddedToTheLongest()
    found = list(passes(records, torch.tensor(indices), PassPlan(4, exact=exact)))

    assert sorted(torch.cat([part.indices for part in found]).tolist()) == sorted(indices)
    assert not exact or len(found) == len(indices)
    for part in found:
        for i, row in zip(part.indices.tolist(), part.batch["input_ids"], strict=True):
            assert torch.equal(row, records.batch(torch.tensor([i]))["input_ids"][0])
