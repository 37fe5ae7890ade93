"""What a function says of named arrays, kept for a caller that comes with the same arrays again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

T = TypeVar("T")


class OfLastArrays(Generic[T]):
    """A function of named arrays that returns its last result if it is given the same objects.

    Arrays that somebody may write to are never taken for the same.

    Parameters
    ----------
    function : callable
        The function. Its result depends on names and values alone.

    Examples
    --------
    >>> import numpy as np
    >>> total = OfLastArrays(lambda arrays: sum(float(array.sum()) for array in arrays.values()))
    >>> total({"head": np.ones(3)})
    3.0
    """

    def __init__(self, function: Callable[[Mapping[str, NDArray[Any]]], T]) -> None:
        self._function = function
        self._last: tuple[list[str], list[NDArray[Any]], T] | None = None

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> T:
        """Return the function's result."""
        names, values, last = list(arrays), list(arrays.values()), self._last
        if last is not None and last[0] == names and all(map(is_, last[1], values)):
            return last[2]
        found = self._function(arrays)
        # Its base could be written to through another array.
        fixed = all(not v.flags.writeable and v.flags.owndata for v in values)
        self._last = (names, values, found) if fixed else None
        return found
