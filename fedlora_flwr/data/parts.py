"""The records of each simulated client, as one array that is cut where a client's records end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Parts(Sequence[NDArray[np.int64]]):
    """Positions of each client's records; a million clients are two arrays and not a million.

    Parameters
    ----------
    positions : NDArray[np.int64]
        Positions of the records that clients get, client by client, each once.
    sizes : NDArray[np.int64]
        Number of records of each client, shape (clients,); their sum is ``len(positions)``.

    Examples
    --------
    >>> parts = Parts(np.array([4, 0, 2]), np.array([2, 1]))
    >>> [part.tolist() for part in parts], parts.sizes.tolist()
    ([[0, 4], [2]], [2, 1])
    """

    def __init__(self, positions: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        self.positions = positions
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @classmethod
    def of(cls, parts: Sequence[NDArray[np.int64]]) -> Parts:
        """Put arrays of positions together, one per client."""
        return cls(np.concatenate(parts), np.array([len(part) for part in parts], np.int64))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of records of each client, shape (clients,)."""
        return np.diff(self._ends, prepend=0)

    def pairs(self, users: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each client and user that belong together, once, as two arrays of one length."""
        own, clients = users[self.positions], np.repeat(np.arange(len(self)), self.sizes)
        width = int(own.max()) + 1
        found = np.unique(clients * width + own)
        return found // width, found % width

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, client: int) -> NDArray[np.int64]: ...

    @overload
    def __getitem__(self, client: slice) -> list[NDArray[np.int64]]: ...

    def __getitem__(self, client: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        """Return the positions of a client's records, ascending; a new array."""
        if isinstance(client, slice):
            return [self[number] for number in range(len(self))[client]]
        number = range(len(self))[client]
        begin = self._ends[number - 1] if number else 0
        return np.sort(self.positions[begin : self._ends[number]])
