from __future__ import annotations

import hashlib
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.sections.partition import PARTITIONERS
from fedlora_flwr.data.partition import (
    partition_indices,
    partition_records,
    partition_table,
)
from fedlora_flwr.data.splits import Split
from fedlora_flwr.errors import InvalidValue

LABELS = np.random.default_rng(0).integers(0, 10, 1437)

MADE = [name for name in PARTITIONERS if name != "label-shares"]
"""Those that need no shares; `SHARES` below tries the one that does."""


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


@pytest.mark.parametrize(
    "partitioner", sorted(set(PARTITIONERS) - {"natural-id", "size", "label-shares"})
)
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
        "from fedlora_flwr.data.partition import partition_indices\n"
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


WRITERS = np.array([f"writer-{number}" for number in np.random.default_rng(1).integers(0, 7, 1437)])
COLUMNS = {"label": LABELS, "writer": WRITERS}


def digest(parts: Iterable[np.ndarray]) -> str:
    return hashlib.sha256(b"|".join(part.tobytes() for part in parts)).hexdigest()[:16]


def test_iid_and_dirichlet_parts_are_those_of_the_first_release() -> None:
    labels = np.arange(400) % 10
    assert digest(partition_indices(labels, "iid", 7, 42)) == "7004a909a3e13bb9"
    assert digest(partition_indices(labels, "dirichlet", 7, 42, alpha=0.5)) == "8821af5865314549"


@pytest.mark.parametrize(("records", "clients"), [(5, 1), (7, 7), (100, 9), (101, 10)])
def test_iid_parts_are_those_that_flwr_datasets_deals(records: int, clients: int) -> None:
    order = np.random.default_rng(3).permutation(records)
    partitioner = IidPartitioner(num_partitions=clients)
    partitioner.dataset = Dataset.from_dict({"index": order})
    theirs = [sorted(partitioner.load_partition(i)["index"]) for i in range(clients)]
    found = partition_indices(np.zeros(records), "iid", clients, seed=3)
    assert [part.tolist() for part in found] == theirs


@pytest.mark.parametrize(
    "values",
    [np.array(["é", "b", "a", "b", "B", "é", "10", "9"]), np.array([7, -1, 10, 9, 7, 7, 10, 0])],
)
def test_parts_by_value_are_those_that_flwr_datasets_deals(values: np.ndarray) -> None:
    partitioner = NaturalIdPartitioner(partition_by="who")
    partitioner.dataset = Dataset.from_dict({"index": range(len(values)), "who": values})
    clients = partitioner.num_partitions
    theirs = [sorted(partitioner.load_partition(i)["index"]) for i in range(clients)]
    for who in (values, values.astype(object)):
        found = partition_records({"who": who}, Split("natural-id", clients, 3, column="who"))
        assert [part.tolist() for part in found] == theirs


@pytest.mark.parametrize("partitioner", ["iid", "natural-id"])
def test_a_million_clients_are_a_few_arrays(partitioner: str) -> None:
    clients, records = 1_000_000, 1_200_000
    who = np.random.default_rng(0).permutation(np.arange(records) % clients)
    tracemalloc.start()
    parts = partition_records({"who": who}, Split(partitioner, clients, 3, column="who"))
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3 * 8 * records
    assert most < 10 * 8 * records
    assert (len(parts), int(parts.sizes.min()), int(parts.sizes.max())) == (clients, 1, 2)
    np.testing.assert_array_equal(np.sort(parts.positions), np.arange(records))
    if partitioner == "natural-id":
        assert {int(value) for value in who[parts[777_777]]} == {777_777}


@pytest.mark.parametrize("partitioner", MADE)
def test_every_partitioner_gives_disjoint_sorted_parts_that_repeat(partitioner: str) -> None:
    split = Split(partitioner, 7, 3, column="writer" * (partitioner == "natural-id"))
    split = replace(split, sizes=(10, 20, 30, 40, 50, 60, 70))
    parts, again = (partition_records(COLUMNS, split) for _ in range(2))

    assert len(parts) == 7
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    assert digest(parts) == digest(again)
    if partitioner not in ("shard", "size", "pathological"):
        assert len(everything) == len(LABELS)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_pathological_clients_have_few_classes(classes: int) -> None:
    split = Split("pathological", 12, 5, classes_per_partition=classes)
    parts = partition_records(COLUMNS, split)
    assert [len(np.unique(LABELS[part])) for part in parts] == [classes] * 12
    assert sum(map(len, parts)) == len(LABELS), "twelve clients can take all ten classes"


def test_classes_that_no_client_gets_are_named(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(90) % 3
    partition_records({"label": labels}, Split("pathological", 2, 5, classes_per_partition=1))
    assert [record.getMessage() for record in caplog.records] == [
        "No client gets records of the classes 2."
    ]


def test_shards_are_runs_of_the_sorted_labels() -> None:
    labels = np.repeat(np.arange(10), 40)
    parts = partition_records({"label": labels}, Split("shard", 10, 5, classes_per_partition=2))
    assert {len(part) for part in parts} == {40}
    assert all(np.bincount(labels[part]).max() in (20, 40) for part in parts)


def test_natural_ids_are_clients_in_sorted_order() -> None:
    parts = partition_records(COLUMNS, Split("natural-id", 7, 3, column="writer"))
    assert [set(WRITERS[part]) for part in parts] == [{f"writer-{i}"} for i in range(7)]


def test_a_partitioner_by_label_can_split_by_another_column() -> None:
    split = Split("pathological", 7, 3, classes_per_partition=1, column="writer")
    parts = partition_records(COLUMNS, split)
    assert [len(set(WRITERS[part])) for part in parts] == [1] * 7


def test_sizes_grow_as_named() -> None:
    def sizes(partitioner: str) -> list[int]:
        return [len(p) for p in partition_indices(np.zeros(900), partitioner, 3, seed=1)]

    assert sizes("linear") == [150, 300, 450]
    assert sizes("square") == [64, 257, 579]
    assert sizes("exponential") == [81, 220, 599]
    given = Split("size", 3, 1, sizes=(5, 100, 7))
    assert [len(part) for part in partition_records(COLUMNS, given)] == [5, 100, 7]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("key", "words", "split"),
    [
        ("partition-column", "'writer'", Split("natural-id", 7, 1)),
        ("partition-column", "did you mean 'writer'", Split("natural-id", 7, 1, column="write")),
        ("partition-column", "'label'", Split("shard", 7, 1, column="tag")),
        ("partition-column", "missing values", Split("natural-id", 7, 1, column="gaps")),
        (
            "num-clients",
            "7, as partition-column = 'writer'",
            Split("natural-id", 8, 1, column="writer"),
        ),
        ("min-records", "natural-id", Split("natural-id", 7, 1, min_size=203, column="writer")),
        (
            "num-clients",
            "expected 7, as partition-column = 'writer' has that many values. Set 0 to take the "
            "number from there; `flwr run` needs num-supernodes=7. Lower min-records, too, from "
            "203",
            Split("natural-id", 4, 1, min_size=203, column="writer"),
        ),
        ("min-records", "at most 5", Split("size", 2, 1, min_size=6, sizes=(5, 9))),
        ("classes-per-client", "1 to 10", Split("pathological", 3, 1, classes_per_partition=11)),
        ("num-clients", "2, as partition-sizes is for", Split("size", 3, 1, sizes=(5, 9))),
        ("partition-sizes", "gives each client", Split("size", 3, 1)),
        ("partitioner", "suits the records", Split("size", 2, 1, sizes=(1000, 1000))),
        ("partitioner", "suits the records", Split("exponential", 12, 1)),
        ("classes-per-client", "1 to 2", Split("shard", 700, 1, classes_per_partition=3)),
    ],
)
def test_settings_that_do_not_suit_the_records_are_named(
    key: str, words: str, split: Split, capfd: pytest.CaptureFixture[str]
) -> None:
    gaps = np.array([None, *WRITERS[1:]], dtype=object)
    with pytest.raises(InvalidValue) as caught:
        partition_records({**COLUMNS, "gaps": gaps}, split)
    assert caught.value.key == key
    assert words in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_split_is_read_from_the_configuration() -> None:
    config = RunConfig.of(
        {
            "partitioner": "size",
            "dirichlet-alpha": 0.25,
            "min-records": 3,
            "classes-per-client": 4,
            "partition-column": "writer",
            "partition-sizes": "5, 6,7",
        }
    )
    assert Split.of(config, 3, 9) == Split("size", 3, 9, 0.25, 3, 4, "writer", (5, 6, 7))


@pytest.mark.parametrize("text", ["5,x", "5,0", "-1", "1.5"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidValue, match="partition-sizes"):
        Split.of(RunConfig.of({"partition-sizes": text}), 3, 0)


def test_the_table_counts_records_by_client_and_class() -> None:
    labels = np.array([3, 1, 1, 7, 3, 3])
    table = partition_table(
        labels, [np.array([0, 1, 4]), np.array([], dtype=int), np.array([2, 5])]
    )
    assert table.columns.to_numpy().tolist() == [1, 3, 7]
    assert table.index.tolist() == [0, 1, 2]
    assert table.to_numpy().tolist() == [[1, 2, 0], [0, 0, 0], [1, 1, 0]]


SHARES = ((0.9, 0.1), (0.1, 0.9), (0.5, 0.5))


@pytest.mark.parametrize("of_first", [300, 100])
def test_label_shares_give_clients_of_one_size_the_stated_mixes(of_first: int) -> None:
    labels = np.repeat([0, 1], [of_first, 300])
    split = Split("label-shares", 3, seed=5, shares=SHARES)

    parts = partition_records({"label": labels}, split)

    size = of_first / 1.5  # The scarce class decides: clients ask for 1.5 of their size of it.
    counts = [np.bincount(labels[part], minlength=2) for part in parts]
    np.testing.assert_allclose(counts, np.array(SHARES) * size, atol=1)
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    np.testing.assert_array_equal(parts[0], partition_records({"label": labels}, split)[0])


def test_records_that_no_share_asks_for_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.repeat([0, 1, 2], 10)
    split = Split("label-shares", 2, seed=5, shares=((1.0, 0.0, 0.0), (0.5, 0.5, 0.0)))

    parts = partition_records({"label": labels}, split)

    assert [len(part) for part in parts] == [6, 6]
    assert "18 of 30 records" in caplog.text


@pytest.mark.parametrize("text", ["0.9,0.2", "a,b", "1.5,-0.5", "0.5,0.5; 1"])
def test_what_is_no_label_share(text: str) -> None:
    with pytest.raises(InvalidValue, match="label-shares"):
        Split.of(RunConfig.of({"label-shares": text}), 3, 0)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((), "label-shares = '' .* gives each client"),
        (SHARES[:2], "num-clients = 3 .* expected 2, as label-shares is for that many"),
        (((1.0,),) * 3, "label-shares = '1; 1; 1' .* a share for each of 2 classes"),
    ],
)
def test_label_shares_for_other_clients_or_classes(
    shares: tuple[tuple[float, ...], ...], words: str
) -> None:
    with pytest.raises(InvalidValue, match=words):
        partition_records(
            {"label": np.array([0, 1] * 9)}, Split("label-shares", 3, seed=5, shares=shares)
        )
