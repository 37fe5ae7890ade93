"""What averaging the factors of clients' products loses of the mean of the products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, normalize
from fedlora_flwr.algebra.running_sum import AnySum, Array64, RunningSum
from fedlora_flwr.layout import Layout

NARROW = 256
"""Stacked columns up to which Gram matrices are cheap. Above that, random probes estimate."""
# At least this many probes for a layer, and for all layers together.
_PROBES, _ALL_PROBES = 8, 64

Names: TypeAlias = tuple[str, str]


def moving_pairs(current: Arrays, names: Iterable[str]) -> list[Names]:
    """Return B and A of each layer of which both are among the names."""
    layout, sent = Layout.of(current), set(names)
    return [pair for pair in map(layout.pair, layout.layers) if sent >= set(pair)]


def stacked_width(current: Arrays, names: Iterable[str], count: int) -> int:
    """Return how many columns the stacked factors of a number of clients have, in one layer.

    Parameters
    ----------
    current : Arrays
        The global arrays.
    names : Iterable[str]
        The arrays that an upload holds.
    count : int
        Number of uploads.

    Returns
    -------
    int
        0 where no layer has both factors among the names. Up to `NARROW`, `mean_error` is cheap.
    """
    pairs = moving_pairs(current, names)
    return max((len(current[a]) for _, a in pairs), default=0) * count


def mean_error(
    current: Arrays, uploads: Sequence[Arrays], weights: Sequence[float]
) -> float | None:
    """Return what averaging factors loses: ``|Σ p_k B_k A_k - B̄ Ā|`` over ``|Σ p_k B_k A_k|``.

    The norms are Frobenius norms over all layers. The difference is ``Σ p_k (B_k - B̄)(A_k - Ā)``.
    No m x n matrix is formed: the norms follow from Gram matrices of the stacked factors.

    Parameters
    ----------
    current : Arrays
        The global arrays, which hold the factors that no client uploads.
    uploads : Sequence[Arrays]
        At least one.
    weights : Sequence[float]
        One for each upload.

    Returns
    -------
    float or None
        0 where clients share one factor of each layer; ``None`` where the mean product is zero.
    """
    if not moving_pairs(current, uploads[0]):
        return 0.0
    layout, shares = Layout.of(current), normalize(weights)
    squares = [_squares(current, uploads, shares, layout.pair(one)) for one in layout.layers]
    return _ratio(np.sum(squares, axis=0))


def _squares(
    current: Arrays, uploads: Sequence[Arrays], shares: Array64, names: Names
) -> tuple[float, float]:
    """Return the squared norms of one layer's difference and of its mean product."""
    pairs = [tuple(upload.get(name, current[name]) for name in names) for upload in uploads]
    mean_b, mean_a = (_mean([pair[side] for pair in pairs], shares) for side in (0, 1))
    width = len(mean_a) * len(pairs)
    left = np.hstack([*(p * (b - mean_b) for p, (b, _) in zip(shares, pairs, strict=True)), mean_b])
    right = np.vstack([*(a - mean_a for _, a in pairs), mean_a])
    products = (left.T @ left) * (right @ right.T)
    return float(products[:width, :width].sum()), float(products.sum())


def _mean(arrays: Sequence[NDArray[np.floating]], shares: Array64) -> Array64:
    total = np.zeros(arrays[0].shape)
    for share, array in zip(shares, arrays, strict=True):
        total += share * array.astype(np.float64)
    return total


def _ratio(squares: Sequence[float]) -> float | None:
    lost, whole = (math.sqrt(max(float(square), 0.0)) for square in squares)
    return lost / whole if whole else None


class ProbedProducts:
    """Estimates `mean_error` from uploads that are added one by one and not kept.

    With updates b_k and a_k of the factors, the difference is ``L = Σ p_k b_k a_k - b̄ ā``. Its
    products with vectors are sums over the clients, so L is known by what it does to some: its norm
    from random probes, which are the same in every round, and its product with the start of A,
    which most of ``⟨B̄ Ā, L⟩`` is made of, exactly.

    Parameters
    ----------
    current : Arrays
        The global arrays, which hold the factors that no client uploads.
    names : Iterable[str]
        The arrays that an upload holds.
    sums : type (default: `RunningSum`)
        What adds up.
    """

    def __init__(
        self, current: Arrays, names: Iterable[str], sums: type[AnySum] = RunningSum
    ) -> None:
        self._current, layout = current, Layout.of(current)
        self._layers = [layout.pair(layer) for layer in layout.layers]
        self._right: dict[Names, Array64] = {}
        self._sums: dict[Names, AnySum] = {}
        pairs = moving_pairs(current, names)
        self._probes = max(_PROBES, -(-_ALL_PROBES // max(len(pairs), 1)))
        for b, a in pairs:
            n = current[a].shape[1]
            probes = np.random.default_rng(0).standard_normal((n, self._probes))
            right = self._right[b, a] = np.hstack([current[a].T.astype(np.float64), probes])
            self._sums[b, a] = sums(len(current[b]) * right.shape[1])

    def add(self, update: Mapping[str, Array64], weight: float) -> None:
        """Take in a client's update."""
        for (b, a), total in self._sums.items():
            total.add((update[b] @ (update[a] @ self._right[b, a])).ravel(), weight)

    def error(self, updates: Mapping[str, Array64], weight: float) -> float | None:
        """Return the estimate.

        Parameters
        ----------
        updates : Mapping[str, ndarray]
            The mean of the updates.
        weight : float
            Sum of the weights.
        """
        if not self._sums:
            return 0.0
        lost = whole = 0.0
        for b, a in self._layers:
            mean_b, mean_a = (self._current[n] + updates.get(n, np.float64(0)) for n in (b, a))
            whole += float(((mean_b.T @ mean_b) * (mean_a @ mean_a.T)).sum())
            if (b, a) not in self._sums:
                continue
            answers = self._sums[b, a].total.reshape(len(mean_b), -1) / weight
            moved = updates[a] @ self._right[b, a]
            answers -= updates[b] @ moved
            rank = len(mean_a)
            drawn = answers[:, rank:]
            crossed = float(np.vdot(mean_b, answers[:, :rank]))
            crossed += float(np.vdot(mean_b @ moved[:, rank:], drawn)) / self._probes
            square = float(np.vdot(drawn, drawn)) / self._probes
            lost, whole = lost + square, whole + 2 * crossed + square
        return _ratio((lost, whole))
