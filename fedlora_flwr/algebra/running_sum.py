"""Sums of vectors that come one after the other."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array64 = NDArray[np.float64]

_BLOCK = 1 << 13  # entries; what one block needs stays in a core's cache


class PlainSum:
    """Adds up vectors in fp64, for terms that come in the same order every time.

    Parameters
    ----------
    size : int
        Entries of the vectors.
    """

    def __init__(self, size: int) -> None:
        self._sum, self._term = np.zeros(size), np.empty(size)

    def add(self, term: Array64, scale: float = 1.0) -> None:
        """Add a vector, shape (size,), times a number."""
        self._sum += np.multiply(term, scale, out=self._term)

    @property
    def total(self) -> Array64:
        """The sum; a new array."""
        return self._sum.copy()


class RunningSum:
    """Adds up vectors in twice the digits of fp64, for terms that come in any order.

    Each entry is a pair of fp64 numbers, the sum and what rounding has left out of it (Knuth,
    TAOCP 2, 4.2.2, theorem B). So a sum has about 106 bits. It is exact, and the same in every
    order, if the terms of an entry and their sum fit into them. That holds for fp32 terms within a
    factor of 2⁶⁰ of each other. Of other terms, orders may differ by 2⁻¹⁰⁴ of the largest, which
    `total` rounds away.

    Parameters
    ----------
    size : int
        Entries of the vectors.

    Examples
    --------
    >>> found = RunningSum(1)
    >>> for term in (1.0, 1e20, -1e20):  # fp64 alone gives 0 in this order.
    ...     found.add(np.array([term]))
    >>> found.total.tolist()
    [1.0]
    """

    def __init__(self, size: int) -> None:
        self._high, self._low = np.zeros(size), np.zeros(size)

    def add(self, term: Array64, scale: float = 1.0) -> None:
        """Add a vector, times a number.

        Parameters
        ----------
        term : ndarray, (size,)
            Finite numbers.
        scale : float (default: 1)
            The number.
        """
        for first in range(0, len(term), _BLOCK):
            place = slice(first, first + _BLOCK)
            high, low = self._high[place], self._low[place]
            new = term[place] * scale
            total = high + new
            kept = total - high
            new -= kept
            np.subtract(total, kept, out=kept)
            np.subtract(high, kept, out=kept)
            kept += new
            low += kept
            high[:] = total

    @property
    def total(self) -> Array64:
        """The sum, rounded to fp64; a new array."""
        return self._high + self._low


AnySum: TypeAlias = PlainSum | RunningSum
"""What adds vectors up."""
