"""The nodes of a simulation: one for each partition, with an id that is another in every run."""

from __future__ import annotations

import secrets

from fedlora_flwr.strategies.roster import Roster
from fedlora_flwr.wire import partition_name

_IDS = 2**62
_FIRST = 2  # Flower has taken the ids below.


class Partitions(Roster):
    """Nodes whose clients are called after their partitions.

    Ids and partitions follow from each other, so a million nodes take no more memory than one. The
    ids differ from run to run and are in no order, as Flower's are, so no code can depend on them.

    Parameters
    ----------
    count : int
        Number of nodes; node i has partition i.

    Examples
    --------
    >>> nodes = Partitions(1_000_000)
    >>> nodes.name(7), nodes.find("partition-000007"), nodes.index(nodes[7])
    ('partition-000007', 7, 7)
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # Multiplication by an odd number can be undone modulo a power of two.
        self._factor, self._shift = 2 * secrets.randbits(61) + 1, secrets.randbits(62)
        self._inverse = pow(self._factor, -1, _IDS)

    def __len__(self) -> int:
        return self._count

    def node(self, position: int) -> int:
        """See `Roster.node`."""
        return (position * self._factor + self._shift) % _IDS + _FIRST

    def name(self, position: int) -> str:
        """See `Roster.name`."""
        return partition_name(position)

    def find(self, name: str) -> int | None:
        """See `Roster.find`."""
        number = name.rpartition("-")[2]
        position = int(number) if number.isascii() and number.isdecimal() else -1
        there = 0 <= position < self._count and partition_name(position) == name
        return position if there else None

    def index(self, node: int, start: int = 0, stop: int | None = None) -> int:
        """Return the partition of a node.

        Raises
        ------
        ValueError
            No partition from ``start`` to before ``stop`` has that node.
        """
        position = (node - _FIRST - self._shift) * self._inverse % _IDS
        if position in range(self._count)[start:stop] and self.node(position) == node:
            return position
        raise ValueError(f"{node} is not a node of this simulation")

    def __contains__(self, node: object) -> bool:
        try:
            return isinstance(node, int) and self.index(node) >= 0
        except ValueError:
            return False
