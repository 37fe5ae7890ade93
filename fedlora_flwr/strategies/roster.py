"""The connected nodes in the order of their clients' names, and those that are gone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import ClassVar, overload


class Roster(Sequence[int]):
    """Node ids in the order of their clients' names.

    A grid may return a roster from `get_node_ids`. It then vouches for the names, which are the
    same in every run, and for the nodes, which are the same in every round. So nobody is asked who
    it is, and no list of all nodes is made.

    Attributes
    ----------
    lasting : bool
        Whether names and nodes stay as they are.
    """

    lasting: ClassVar[bool] = True

    @abstractmethod
    def node(self, position: int) -> int:
        """Return the node at a position, from 0 to ``len(self) - 1``."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Return the name of the client at a position."""

    @abstractmethod
    def find(self, name: str) -> int | None:
        """Return the position of the client of a name, or None where there is none."""

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        """Return the node at a position, or the nodes of a slice."""
        if isinstance(place, slice):
            return [self.node(position) for position in range(len(self))[place]]
        return self.node(range(len(self))[place])


class Listed(Roster):
    """The nodes that are connected at one moment, by what they are called then.

    Parameters
    ----------
    nodes : Iterable[int]
        Their ids.
    name : callable
        Names a node. No two nodes have the same name.

    Examples
    --------
    >>> names = {7: "ward-2", 9: "ward-1"}
    >>> there = Listed(names, names.__getitem__)
    >>> list(there), there.find("ward-2"), there.find("ward-3")
    ([9, 7], 1, None)
    """

    lasting: ClassVar[bool] = False

    def __init__(self, nodes: Iterable[int], name: Callable[[int], str]) -> None:
        named = sorted((name(node), node) for node in nodes)
        self._nodes = [node for _, node in named]
        self._names = [called for called, _ in named]
        self._positions = {called: position for position, called in enumerate(self._names)}

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, position: int) -> int:
        """See `Roster.node`."""
        return self._nodes[position]

    def name(self, position: int) -> str:
        """See `Roster.name`."""
        return self._names[position]

    def find(self, name: str) -> int | None:
        """See `Roster.find`."""
        return self._positions.get(name)


class Attendance:
    """The nodes that were connected at some time in a run."""

    def __init__(self) -> None:
        self._seen: Collection[int] = ()

    def __len__(self) -> int:
        return len(self._seen)

    def gone(self, connected: Iterable[int]) -> list[int]:
        """Note who is connected now, and return those that were and no longer are."""
        if isinstance(connected, Roster) and connected.lasting:
            self._seen = connected
            return []
        there = set(connected)
        self._seen = there.union(self._seen)
        return [node for node in self._seen if node not in there]
