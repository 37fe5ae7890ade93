"""Updates that strategies fold into the frozen weights, as factors of growing rank."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.factors import Pair, add, compact
from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.layout import Float, folded_names
from fedlora_flwr.randomness import stream_seed


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


def fresh_a(like: NDArray[Float], seed: int, *names: object) -> NDArray[Float]:
    """Draw an A as PEFT does at the start of a run.

    Parameters
    ----------
    like : ndarray
        An A of shape (r, n); the result has its shape and type.
    seed : int
        Seed of the run.
    *names
        What names the random stream, e.g. a method and a round.

    Returns
    -------
    ndarray
        Independent entries, uniform on ±1/√n.
    """
    bound = like.shape[1] ** -0.5
    generator = np.random.default_rng(stream_seed(seed, *names))
    return generator.uniform(-bound, bound, like.shape).astype(like.dtype)
