from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.partition import PARTITIONERS, partition_indices

LABELS = np.random.default_rng(0).integers(0, 10, 1437)


@settings(max_examples=40, deadline=None)
@given(
    partitioner=st.sampled_from(["iid", "dirichlet"]),
    seed=st.integers(0, 2**63 - 1),
    clients=st.integers(1, 12),
    classes=st.integers(1, 10),
    records=st.integers(60, 300),
)
def test_parts_are_sorted_disjoint_cover_and_repeat(
    partitioner: str, seed: int, clients: int, classes: int, records: int
) -> None:
    labels = np.arange(records) % classes

    parts, again = (
        partition_indices(labels, partitioner, clients, seed, alpha=5.0) for _ in range(2)
    )

    assert len(parts) == clients
    assert all(len(part) >= 1 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(records))
    for part, same in zip(parts, again, strict=True):
        np.testing.assert_array_equal(part, same)


def test_iid_parts_are_even_and_mixed() -> None:
    parts = partition_indices(LABELS, "iid", 10, seed=1)

    assert {len(part) for part in parts} == {143, 144}
    assert all(np.bincount(LABELS[part], minlength=10).max() < 35 for part in parts)


def test_a_small_alpha_gives_more_uneven_label_mixes_than_a_large_one() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition_indices(LABELS, "dirichlet", 5, seed=1, alpha=alpha)
        return float(np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts]))

    assert largest_share(0.1) > 2 * largest_share(100.0)


@pytest.mark.parametrize("partitioner", sorted(set(PARTITIONERS) - {"natural-id", "size"}))
def test_another_seed_gives_other_parts(partitioner: str) -> None:
    first, second = (partition_indices(LABELS, partitioner, 4, seed) for seed in (1, 2))

    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_draws_are_repeated_until_the_smallest_client_is_large_enough() -> None:
    # At this seed the first draw leaves a client with fewer than 60 records.
    assert min(map(len, partition_indices(LABELS, "dirichlet", 10, 0, alpha=0.5))) < 60

    parts = partition_indices(LABELS, "dirichlet", 10, 0, alpha=0.5, min_size=60)

    assert min(map(len, parts)) >= 60


def test_another_process_gets_the_same_parts() -> None:
    program = (
        "import numpy as np\n"
        "from fedlora_flwr.tasks.partition import partition_indices\n"
        "labels = np.arange(400) % 10\n"
        "parts = partition_indices(labels, 'dirichlet', 5, 7)\n"
        "print([part.tolist() for part in parts])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    parts = partition_indices(np.arange(400) % 10, "dirichlet", 5, 7)

    assert run.stdout.strip() == str([part.tolist() for part in parts])
    assert run.stderr == ""


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("partitioner", {"partitioner": "dirichlett"}),
        ("num-clients", {"num_partitions": 0}),
        ("num-clients", {"num_partitions": 1438}),
        ("min-records", {"min_size": 0}),
        ("min-records", {"min_size": 144}),
        ("min-records", {"partitioner": "iid", "min_size": 144}),
        ("min-records", {"min_size": 143, "alpha": 0.1}),
        ("dirichlet-alpha", {"alpha": 0.0}),
        ("dirichlet-alpha", {"alpha": -1.0}),
        ("dirichlet-alpha", {"alpha": float("nan")}),
        ("dirichlet-alpha", {"alpha": float("inf")}),
    ],
)
def test_what_cannot_be_met_is_refused_by_name_and_without_warnings(
    key: str, arguments: dict[str, object]
) -> None:
    usual: dict[str, object] = {"partitioner": "dirichlet", "num_partitions": 10, "seed": 42}

    with pytest.raises(InvalidValue) as caught:
        partition_indices(LABELS, **{**usual, **arguments})  # type: ignore[arg-type]

    assert caught.value.key == key
