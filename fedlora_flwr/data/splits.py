"""How a simulation spreads records over clients, according to the run configuration."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.sections import PartitionSection
from fedlora_flwr.errors import InvalidValue


@dataclass(frozen=True)
class Split:
    """How records are spread over clients.

    Parameters
    ----------
    partitioner : str
        One of `fedlora_flwr.config.sections.partition.PARTITIONERS`.
    num_partitions : int
        Number of clients.
    seed : int
        Seed of the order of the records and of the partitioner's own draws.
    alpha : float (default: 0.5)
        Dirichlet concentration: the smaller, the more the clients' label mixes differ.
    min_size : int (default: 1)
        Least number of records per client.
    classes_per_partition : int (default: 2)
        Number of classes per client (``"pathological"``) or of shards per client (``"shard"``).
    column : str (default: "")
        What ``"dirichlet"``, ``"pathological"``, ``"shard"`` and ``"natural-id"`` split by; empty
        is ``"label"``, which ``"natural-id"`` does not take.
    sizes : tuple[int, ...] (default: ())
        Number of records of each client (``"size"``).
    shares : tuple[tuple[float, ...], ...] (default: ())
        Shares of the classes in each client's records, one row per client (``"label-shares"``).
    """

    partitioner: str
    num_partitions: int
    seed: int
    alpha: float = 0.5
    min_size: int = 1
    classes_per_partition: int = 2
    column: str = ""
    sizes: tuple[int, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, partition: PartitionSection, num_partitions: int, seed: int) -> Split:
        """Make a split from its section of the configuration.

        Raises
        ------
        InvalidValue
            ``partition-sizes`` are not numbers, or ``label-shares`` are not shares.
        """
        return cls(
            partitioner=partition.partitioner,
            num_partitions=num_partitions,
            seed=seed,
            alpha=partition.dirichlet_alpha,
            min_size=partition.min_records,
            classes_per_partition=partition.classes_per_client,
            column=partition.partition_column,
            sizes=_whole_numbers(partition.partition_sizes),
            shares=_shares(partition.label_shares),
        )

    @property
    def listed(self) -> int:
        """Number of clients in the list of ``"size"`` or ``"label-shares"``, 0 for all others."""
        return {"size": len(self.sizes), "label-shares": len(self.shares)}.get(self.partitioner, 0)

    @property
    def by(self) -> str:
        """Name of the column that label-based partitioners split by."""
        return self.column or "label"


def _whole_numbers(text: str) -> tuple[int, ...]:
    allowed = "whole numbers above 0 with commas between them"
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InvalidValue("partition-sizes", text, allowed) from error
    if any(number < 1 for number in numbers):
        raise InvalidValue("partition-sizes", text, allowed)
    return numbers


def _shares(text: str) -> tuple[tuple[float, ...], ...]:
    allowed = "numbers that add up to 1 for each client, e.g. '0.9,0.1; 0.1,0.9'"
    try:
        rows = [[float(one) for one in row.split(",")] for row in text.split(";") if row.strip()]
    except ValueError as error:
        raise InvalidValue("label-shares", text, allowed) from error
    good = all(min(row) >= 0 and abs(sum(row) - 1) < 1e-6 for row in rows)
    if not good or len({len(row) for row in rows}) > 1:
        raise InvalidValue("label-shares", text, allowed)
    return tuple(map(tuple, rows))
