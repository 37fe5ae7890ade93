"""Records over simulated clients, by the partitioners of flwr-datasets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue, one_of

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True)
class Split:
    """What a partitioner is built from.

    Parameters
    ----------
    num_partitions : int
        Clients.
    seed : int
        Seed of the partitioner's own draws.
    alpha : float
        Dirichlet concentration: the smaller, the more the clients' label mixes differ.
    min_size : int
        Records that the smallest client must have.
    """

    num_partitions: int
    seed: int
    alpha: float
    min_size: int


def _iid(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(num_partitions=split.num_partitions)


def _dirichlet(split: Split) -> Partitioner:
    from flwr_datasets.partitioner import DirichletPartitioner

    if not (math.isfinite(split.alpha) and split.alpha > 0):
        raise InvalidValue("dirichlet-alpha", split.alpha, "a number above 0")
    return DirichletPartitioner(
        num_partitions=split.num_partitions,
        partition_by="label",
        alpha=float(split.alpha),
        min_partition_size=split.min_size,
        self_balancing=False,
        seed=split.seed,
    )


PARTITIONERS: dict[str, Callable[[Split], Partitioner]] = {"iid": _iid, "dirichlet": _dirichlet}


def partition_indices(
    labels: NDArray[Any],
    partitioner: str,
    num_partitions: int,
    seed: int,
    *,
    alpha: float = 0.5,
    min_size: int = 1,
) -> list[NDArray[np.int64]]:
    """Deal records out to clients.

    The same arguments give the same parts in every process.

    Parameters
    ----------
    labels : NDArray
        Class of each record, shape (n,).
    partitioner : str
        A key of `PARTITIONERS`: ``"iid"`` or ``"dirichlet"`` (Yurochkin et al.,
        arXiv:1905.12022, per label, without balancing).
    num_partitions : int
        Clients, from 1 to n.
    seed : int
        Seed of the order of the records and of the partitioner.
    alpha : float (default: 0.5)
        Dirichlet concentration; ``"iid"`` does not read it.
    min_size : int (default: 1)
        Records that every client must get.

    Returns
    -------
    list[NDArray[np.int64]]
        Positions of each client's records, ascending. The parts are disjoint and cover all.

    Raises
    ------
    InvalidValue
        An argument is out of range, or no draw gave every client ``min_size`` records.
    """
    if partitioner not in PARTITIONERS:
        raise InvalidValue("partitioner", partitioner, one_of(PARTITIONERS, partitioner))
    _require_feasible(len(labels), num_partitions, min_size)
    split = Split(num_partitions, seed, alpha, min_size)
    parts = _dealt(labels, PARTITIONERS[partitioner](split), split)
    if min(map(len, parts)) < min_size:
        raise _unmet(split)
    return parts


def _require_feasible(records: int, num_partitions: int, min_size: int) -> None:
    if not 1 <= num_partitions <= records:
        raise InvalidValue("num-clients", num_partitions, f"1 to {records}, one record each")
    most = records // num_partitions
    if not 1 <= min_size <= most:
        reason = f"1 to {most}, as {num_partitions} clients share {records} records"
        raise InvalidValue("min-records", min_size, reason)


def _dealt(labels: NDArray[Any], partitioner: Partitioner, split: Split) -> list[NDArray[np.int64]]:
    from datasets import Dataset

    # The partitioners cut each class, or the whole, in the order they find it.
    order = np.random.default_rng(split.seed).permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"index": order, "label": labels[order]})
    with warnings.catch_warnings():
        # Each failed draw warns; what matters is whether one of them succeeds.
        warnings.simplefilter("ignore", UserWarning)
        try:
            parts = [partitioner.load_partition(i)["index"] for i in range(split.num_partitions)]
        except ValueError as error:
            raise _unmet(split) from error
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _unmet(split: Split) -> InvalidValue:
    advice = (
        f"a smaller minimum, fewer clients or more even parts than "
        f"{split.num_partitions} with dirichlet-alpha = {split.alpha} (seed {split.seed})"
    )
    return InvalidValue("min-records", split.min_size, advice)
