"""Deals records out to simulated clients, with the partitioners of flwr-datasets."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.config.sections.partition import PARTITIONERS
from fedlora_flwr.data.missing import missing
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.data.splits import Split
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.processes.later import later

if TYPE_CHECKING:
    import pandas as pd
    from flwr_datasets.partitioner import Partitioner

_LOGGER = logging.getLogger(__name__)


def _dirichlet(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import DirichletPartitioner

    if not 0 < split.alpha < float("inf"):
        raise InvalidValue("dirichlet-alpha", split.alpha, "a number above 0")
    return DirichletPartitioner(
        num_partitions=split.num_partitions,
        partition_by=split.by,
        alpha=float(split.alpha),
        min_partition_size=split.min_size,
        self_balancing=False,
        seed=split.seed,
    )


def _pathological(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import PathologicalPartitioner

    # In this mode, clients get the classes one after the other as their first class. So no class is
    # left out if there are at least as many clients as classes.
    return PathologicalPartitioner(
        num_partitions=split.num_partitions,
        partition_by=split.by,
        num_classes_per_partition=split.classes_per_partition,
        class_assignment_mode="first-deterministic",
        seed=split.seed,
    )


def _shard(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import ShardPartitioner

    return ShardPartitioner(
        num_partitions=split.num_partitions,
        partition_by=split.by,
        num_shards_per_partition=split.classes_per_partition,
        seed=split.seed,
    )


def _size(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import SizePartitioner

    return SizePartitioner(partition_sizes=list(split.sizes))


def _by_place(name: str) -> Callable[[Split], Partitioner]:
    """Return the builder of a partitioner in which client i's size is a function of i."""

    def build(split: Split) -> Partitioner:
        from flwr_datasets import partitioner as library

        built: Partitioner = getattr(library, name)(num_partitions=split.num_partitions)
        return built

    return build


_MAKERS: dict[str, Callable[[Split], Partitioner]] = {
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shard": _shard,
    "size": _size,
    "linear": _by_place("LinearPartitioner"),
    "square": _by_place("SquarePartitioner"),
    "exponential": _by_place("ExponentialPartitioner"),
}
LABEL_SHARES = "label-shares"
_BY_COLUMN = ("dirichlet", "pathological", "shard", "natural-id", LABEL_SHARES)


def partition_records(columns: Mapping[str, NDArray[Any]], split: Split) -> Parts:
    """Deal records out to clients.

    The same arguments give the same parts in every process. Classes that no client gets
    (``"pathological"`` with few clients) are named in a warning.

    Parameters
    ----------
    columns : Mapping[str, NDArray]
        One value per record, each of shape (n,): the labels, as ``label``, and other columns by
        which the records may be split.
    split : Split
        How to split. ``"dirichlet"`` is that of Yurochkin et al. (arXiv:1905.12022), per label,
        without balancing. ``"shard"`` is that of McMahan et al. (arXiv:1602.05629): records sorted
        by label are cut into ``num_partitions * classes_per_partition`` equal shards, and the
        remainder is dropped. ``"natural-id"`` makes one client of each of the column's sorted
        values. ``"label-shares"`` gives all clients the same number of records, as many as the
        classes allow, with the given shares of the column's sorted values. Other records are left
        out.

    Returns
    -------
    Parts
        Positions of each client's records, ascending. The parts are disjoint.

    Raises
    ------
    InvalidValue
        A setting is out of range, or does not suit these records.
    """
    if split.partitioner not in PARTITIONERS:
        raise unknown("partitioner", split.partitioner, PARTITIONERS)
    if split.partitioner in _BY_COLUMN:
        _check_values(_column(columns, split), split)
    _check_listed(split)
    records = len(next(iter(columns.values())))
    _require_feasible(records, split)
    # As flwr-datasets deals. It would import its plots first, in a device for each message, and
    # makes an object of each client.
    if split.partitioner == "iid":
        parts = _evenly(records, split)
    elif split.partitioner == "natural-id":
        parts = _by_value(columns[split.by])
    elif split.partitioner == LABEL_SHARES:
        parts = _by_shares(columns[split.by], split)
    else:
        # The pictures of flwr-datasets take longer to import than all else of it.
        with later("flwr_datasets.visualization"):
            partitioner = _MAKERS[split.partitioner](split)
        parts = _dealt(columns, partitioner, split)
    if (smallest := int(parts.sizes.min())) < split.min_size:
        raise _unmet(split, smallest)
    if split.partitioner == "pathological":
        _warn_of_unused(columns[split.by], parts)
    return parts


def client_values(columns: Mapping[str, NDArray[Any]], split: Split) -> list[str]:
    """Return the value of the column that each client of ``"natural-id"`` is made of.

    Parameters
    ----------
    columns, split
        As for `partition_records`. ``split.num_partitions`` is not read.

    Returns
    -------
    list[str]
        One value per client; empty for every other partitioner.

    Raises
    ------
    InvalidValue
        There is no such column, or it has missing values.
    """
    if split.partitioner != "natural-id":
        return []
    return [str(value) for value in np.unique(_column(columns, split))]


def partition_indices(
    labels: NDArray[Any],
    partitioner: str,
    num_partitions: int,
    seed: int,
    *,
    alpha: float = 0.5,
    min_size: int = 1,
) -> Parts:
    """Deal labeled records out to clients: `partition_records` for labels only."""
    split = Split(partitioner, num_partitions, seed, alpha, min_size)
    return partition_records({"label": labels}, split)


def partition_table(labels: NDArray[Any], parts: Sequence[NDArray[np.int64]]) -> pd.DataFrame:
    """Count each client's records by class.

    Parameters
    ----------
    labels : NDArray
        Class of each record, shape (n,).
    parts : Sequence[NDArray[np.int64]]
        Positions of each client's records.

    Returns
    -------
    pandas.DataFrame
        One row per client (index ``client``, from 0), one column per class that occurs in
        ``labels``, sorted; int64.
    """
    import pandas as pd

    classes, codes = np.unique(labels, return_inverse=True)
    counts = [np.bincount(codes[part], minlength=len(classes)) for part in parts]
    table = np.asarray(counts, dtype=np.int64).reshape(len(parts), len(classes))
    rows = pd.RangeIndex(len(parts), name="client")
    return pd.DataFrame(table, index=rows, columns=pd.Index(classes.tolist(), name="class"))


def _column(columns: Mapping[str, NDArray[Any]], split: Split) -> NDArray[Any]:
    """Return the column by which records are split, and refuse one that cannot be used."""
    named = split.column if split.partitioner == "natural-id" else split.by
    if named not in columns:
        known = set(columns) - {"row"}
        otherwise = ", or partitioner = 'iid', which needs no column"
        if known:
            raise unknown("partition-column", split.column, known, after=otherwise)
        raise InvalidValue("partition-column", split.column, f"a column{otherwise}")
    values = columns[named]
    if missing(values).any():
        raise InvalidValue("partition-column", named, "a column without missing values")
    return values


def _check_values(values: NDArray[Any], split: Split) -> None:
    """Refuse a number of clients, or of classes, that the column's values do not allow."""
    found, counts = np.unique(values, return_counts=True)
    distinct = len(found)
    if split.partitioner == "natural-id" and distinct != split.num_partitions:
        more = ""
        if (fewest := int(counts.min())) < split.min_size:
            more = f". Lower min-records, too, from {split.min_size} to {fewest} at most: a value "
            more += "has so few records"
        why = f"partition-column = {split.by!r} has that many values"
        raise _not_made(split, distinct, why, more)
    if split.partitioner == "pathological" and not 1 <= split.classes_per_partition <= distinct:
        reason = f"1 to {distinct}, the classes of the records"
        raise InvalidValue("classes-per-client", split.classes_per_partition, reason)


def _check_listed(split: Split) -> None:
    """Refuse a list of sizes or shares that is not for this number of clients."""
    key = {"size": "partition-sizes", LABEL_SHARES: "label-shares"}.get(split.partitioner)
    if key and not split.listed:
        raise InvalidValue(key, "", f"what partitioner = {split.partitioner!r} gives each client")
    if key and split.listed != split.num_partitions:
        raise _not_made(split, split.listed, f"{key} is for that many clients")


def _not_made(split: Split, clients: int, why: str, more: str = "") -> InvalidValue:
    """Return the error for a number of clients that the partitioner does not make."""
    allowed = (
        f"{clients}, as {why}. Set 0 to take the number from there; `flwr run` needs "
        f"num-supernodes={clients}{more}"
    )
    return InvalidValue("num-clients", split.num_partitions, allowed)


def _require_feasible(records: int, split: Split) -> None:
    clients, least = split.num_partitions, split.min_size
    if not 1 <= clients <= records:
        raise InvalidValue("num-clients", clients, f"1 to {records}, at least one record each")
    most = records // clients
    if not 1 <= least <= most:
        reason = f"1 to {most}, as {clients} clients share {records} records"
        raise InvalidValue("min-records", least, reason)
    shards = split.classes_per_partition
    if split.partitioner == "shard" and not 1 <= shards <= most:
        allowed = f"1 to {most}, so that each shard has a record"
        raise InvalidValue("classes-per-client", shards, allowed)


def _order(records: int, split: Split) -> NDArray[np.int64]:
    return np.random.default_rng(split.seed).permutation(records)


def _evenly(records: int, split: Split) -> Parts:
    """Cut the shuffled records into parts that differ by one record at most, the larger first."""
    clients = split.num_partitions
    sizes = np.full(clients, records // clients)
    sizes[: records % clients] += 1
    return Parts(_order(records, split), sizes)


def _by_value(values: NDArray[Any]) -> Parts:
    """Give each client the records of one value, in the order of the values."""
    codes, sizes = np.unique(values, return_inverse=True, return_counts=True)[1:]
    return Parts(np.argsort(codes, kind="stable"), sizes)


def _dealt(columns: Mapping[str, NDArray[Any]], partitioner: Partitioner, split: Split) -> Parts:
    from datasets import Dataset

    # The partitioners cut each class, or the whole, in the order they find it.
    order = _order(len(next(iter(columns.values()))), split)
    shuffled = {name: values[order] for name, values in columns.items()}
    partitioner.dataset = Dataset.from_dict({"index": order, **shuffled})
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        # Each failed draw warns, but only a failure of all draws matters. Some partitioners also
        # always show a progress bar.
        warnings.simplefilter("ignore")
        try:
            # Reads a whole column at once: 67,000 records one by one would take two seconds.
            parts = [partitioner.load_partition(i)["index"][:] for i in range(split.num_partitions)]
        except (ValueError, TypeError, ArithmeticError) as error:
            raise _refused(split, error) from error
    return Parts.of([np.asarray(part, dtype=np.int64) for part in parts])


def _by_shares(values: NDArray[Any], split: Split) -> Parts:
    """Deal each class out in the given shares, so that all clients get equally many records."""
    classes, codes = np.unique(values, return_inverse=True)
    shares = np.asarray(split.shares, dtype=np.float64)
    if shares.shape != (split.num_partitions, len(classes)):
        text = "; ".join(",".join(f"{share:g}" for share in row) for row in split.shares)
        allowed = f"a share for each of {len(classes)} classes in each row"
        raise InvalidValue("label-shares", text, allowed)
    order = np.random.default_rng(split.seed).permutation(len(values))
    pools = [order[codes[order] == number] for number in range(len(classes))]
    asked = shares.sum(axis=0)
    sizes = [len(pool) / share for pool, share in zip(pools, asked, strict=True) if share]
    counts = np.floor(min(sizes) * shares + 1e-9).astype(int)
    left = len(values) - int(counts.sum())
    if left:
        _LOGGER.warning("label-shares leaves out %s of %s records.", left, len(values))
    ends = np.cumsum(counts, axis=0)
    parts = [
        [pool[end - count : end] for pool, end, count in zip(pools, row, taken, strict=True)]
        for row, taken in zip(ends, counts, strict=True)
    ]
    return Parts.of([np.concatenate(part).astype(np.int64) for part in parts])


def _refused(split: Split, error: Exception) -> InvalidValue:
    if split.partitioner == "dirichlet":
        return _unmet(split)
    return InvalidValue("partitioner", split.partitioner, f"one that suits the records ({error})")


def _unmet(split: Split, smallest: int | None = None) -> InvalidValue:
    if split.partitioner != "dirichlet":
        return InvalidValue(
            "min-records",
            split.min_size,
            f"at most {smallest}, the records that partitioner = {split.partitioner!r} gives to "
            f"the smallest of {split.num_partitions} clients",
        )
    advice = (
        f"a smaller number, or fewer than {split.num_partitions} clients, or a dirichlet-alpha "
        f"above {split.alpha} (seed {split.seed})"
    )
    return InvalidValue("min-records", split.min_size, advice)


def _warn_of_unused(values: NDArray[Any], parts: Parts) -> None:
    dealt = values[parts.positions]
    unused = sorted(set(np.unique(values).tolist()) - set(np.unique(dealt).tolist()))
    if unused:
        _LOGGER.warning("No client gets records of the classes %s.", ", ".join(map(str, unused)))
