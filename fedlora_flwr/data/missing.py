"""Values that a column lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which values of a column are missing: ``None``, or NaN in a column of numbers.

    Parameters
    ----------
    values : NDArray
        The column, shape (n,).

    Examples
    --------
    >>> missing(np.array(["ann", None], dtype=object)).tolist()
    [False, True]
    """
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values), np.bool_)
    if values.dtype.kind != "O":
        return np.zeros(len(values), bool)
    return np.fromiter((value is None or value != value for value in values), bool, len(values))
