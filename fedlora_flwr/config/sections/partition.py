"""``[partition]``: how a simulation splits the records over its clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import ANY, Decider, above, at_least, choice, key

_PACKAGE = Decider.PACKAGE
_WHOLE = "A device trains on all of its records, so nothing splits them."

PARTITIONERS = (
    "iid", "dirichlet", "pathological", "shard", "natural-id", "size", "linear", "square",
    "exponential", "label-shares",
)  # fmt: skip
"""Ways to split records; `fedlora_flwr.data.partition` makes them."""


@dataclass(frozen=True)
class PartitionSection:
    """How a simulation splits the records over its clients."""

    partitioner: str = key(
        "dirichlet", choice(*PARTITIONERS), "how a simulation splits the records over clients",
        _PACKAGE, _WHOLE, on_device="iid",
    )  # fmt: skip
    dirichlet_alpha: float = key(
        0.5, above(0), "dirichlet: concentration; smaller = more unequal", _PACKAGE, _WHOLE
    )
    min_records: int = key(
        40, at_least(1), "least number of records of a simulated client",
        _PACKAGE, _WHOLE, on_device=1,
    )  # fmt: skip
    classes_per_client: int = key(
        2, at_least(1), "pathological: classes per client; shard: shards per client",
        _PACKAGE, _WHOLE,
    )  # fmt: skip
    partition_column: str = key(
        "", ANY, "column that the partitioner splits by; empty = the label", _PACKAGE, _WHOLE
    )
    partition_sizes: str = key(
        "", ANY, "size: records of each client, e.g. '100,200,300'", _PACKAGE, _WHOLE
    )
    label_shares: str = key(
        "", ANY,
        "label-shares: each client's shares of the classes, e.g. '0.9,0.1; 0.1,0.9; 0.5,0.5'",
        _PACKAGE, _WHOLE,
    )  # fmt: skip

    @property
    def clients_are(self) -> str:
        """What the clients are, if the partitioner itself makes a number of them.

        Empty for a partitioner that deals records out to any number of clients.
        """
        made = {
            "natural-id": f"one for each value of {self.partition_column!r}",
            "size": "one for each number in partition-sizes",
            "label-shares": "one for each row of label-shares",
        }
        return made.get(self.partitioner, "")

    @property
    def split_in_words(self) -> str:
        """The partitioner, and what the clients are if it makes a number of them."""
        return f"{self.partitioner}: {made}" if (made := self.clients_are) else self.partitioner
