"""Updates that strategies fold into the frozen weights, as factors of growing rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import Pair, add, compact
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.layout import folded_names


def fold(current: Arrays, updates: Mapping[str, Pair]) -> dict[str, NDArray[np.floating]]:
    """Add updates to the folded pairs among ``current``.

    Parameters
    ----------
    current : Arrays
        The global arrays; a layer without a folded pair has none yet.
    updates : Mapping[str, Pair]
        B (m, q) and A (q, n) by layer.

    Returns
    -------
    dict[str, ndarray]
        The folded pairs of these layers, at the numerical rank of their sums: at most min(m, n),
        and rank 0 where nothing is to be folded.
    """
    arrays = {}
    for layer, update in updates.items():
        b, a = folded_names(layer)
        pairs = [(current[b], current[a]), update] if b in current else [update]
        arrays[b], arrays[a] = compact(*add(pairs))
    return arrays
