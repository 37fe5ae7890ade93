"""How far a round's uploads agree, and what averaging their factors loses.

The server works this out from uploads that it has anyway, so it costs no privacy. A few arrays of a
few clients are taken at a time, so memory grows with the cohort by only a few numbers per client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, normalize
from fedlora_flwr.layout import Layout, by_part
from fedlora_flwr.strategies.replies import Upload

# Gram matrices are cheap up to _EXACT stacked columns. Above that, random probes estimate: at least
# _PROBES for a layer, and _ALL_PROBES for all layers together.
_EXACT, _PROBES, _ALL_PROBES = 64, 8, 64
# As many clients, and entries of an array, as fit into a processor's cache together.
_CLIENTS, _ENTRIES = 8, 1 << 14


def describe(
    current: Arrays, uploads: Sequence[Upload], *, personal: bool = False
) -> dict[str, Any]:
    """Describe a round's uploads, for the round's row.

    Parameters
    ----------
    current : Arrays
        The global arrays that the clients started from.
    uploads : Sequence[Upload]
        At least one, all with arrays of the same names.
    personal : bool (default: False)
        Whether a factor stays with each client, so that the server knows no client's product.

    Returns
    -------
    dict[str, Any]
        ``agreement``, ``signal`` and ``spread`` (see `Agreement`), each by part (A, B, head), and
        ``mean_error`` (see `mean_error`). Empty if the clients' factors differ in rank.
    """
    shapes = {name: array.shape for name, array in uploads[0].arrays.items()}
    alike = all({n: a.shape for n, a in u.arrays.items()} == shapes for u in uploads)
    if not alike or any(current[name].shape != shape for name, shape in shapes.items()):
        return {}
    found: dict[str, Any] = {} if personal else {"mean_error": mean_error(current, uploads)}
    if len(uploads) > 1:
        parts = by_part(shapes)
        measured = {p: Agreement.of(current, uploads, names) for p, names in parts.items()}
        for figure in ("agreement", "signal", "spread"):
            found[figure] = {part: getattr(entry, figure) for part, entry in measured.items()}
    return found


@dataclass(frozen=True)
class Agreement:
    """How far the updates Δ_k of N >= 2 clients agree, over some arrays taken as one vector.

    Parameters
    ----------
    agreement : float or None
        Mean cosine of all pairs of updates, from -1/(N - 1) to 1; ``None`` if one did not move.
    signal : float
        Norm of what the updates share. It is estimated from inner products of different clients'
        updates, because their noise is independent. 0 where the estimate is not positive.
    spread : float
        Norm of the rest of the mean: privacy noise, the noise of drawing batches, and what the
        clients do not share.
    """

    agreement: float | None
    signal: float
    spread: float

    @classmethod
    def of(cls, current: Arrays, uploads: Sequence[Upload], names: Sequence[str]) -> Agreement:
        """Measure it. For shares p_k, all pairs follow from ``|Σ p_k Δ_k|²`` and ``|Δ_k|²``."""
        shares = normalize([upload.weight for upload in uploads])
        mean, squares = _summed(current, uploads, names, shares)
        own = float((shares**2).sum())
        # E|mean|² = signal² + spread², and E Σ p_k² |Δ_k|² = own · signal² + spread².
        signal = (mean - float(shares**2 @ squares)) / (1 - own) if own < 1 else mean
        signal = min(max(signal, 0.0), mean)
        return cls(
            _cosine(current, uploads, names, squares),
            math.sqrt(signal),
            math.sqrt(mean - signal),
        )


def mean_error(current: Arrays, uploads: Sequence[Upload]) -> float | None:
    """Return what averaging factors loses: ``|Σ p_k B_k A_k - B̄ Ā|`` over ``|Σ p_k B_k A_k|``.

    The norms are Frobenius norms over all layers. The difference is ``Σ p_k (B_k - B̄)(A_k - Ā)``.
    No m x n matrix is formed: the norms follow from Gram matrices of the stacked factors. Where
    the stack is wide, random probes estimate them; the probes are the same in every round.

    Parameters
    ----------
    current : Arrays
        The global arrays, which hold the factors that no client uploads.
    uploads : Sequence[Upload]
        At least one.

    Returns
    -------
    float or None
        0 where clients share one factor of each layer; ``None`` where the mean product is zero.
    """
    layout, sent = Layout.of(current), uploads[0].arrays
    pairs = [layout.pair(layer) for layer in layout.layers]
    if not any(b in sent and a in sent for b, a in pairs):
        return 0.0
    if len(current[pairs[0][1]]) * len(uploads) <= _EXACT:
        squares = [_exact(current, uploads, pair) for pair in pairs]
    else:
        probes = max(_PROBES, -(-_ALL_PROBES // len(pairs)))
        squares = [_estimated(current, uploads, pair, probes) for pair in pairs]
    lost, whole = (math.sqrt(max(sum(of), 0.0)) for of in zip(*squares, strict=True))
    return lost / whole if whole else None


def _exact(
    current: Arrays, uploads: Sequence[Upload], names: tuple[str, str]
) -> tuple[float, float]:
    """Return the squared norms of one layer's difference and of its mean product."""
    shares = normalize([upload.weight for upload in uploads])
    pairs = [tuple(u.arrays.get(name, current[name]) for name in names) for u in uploads]
    mean_b, mean_a = (_mean([pair[side] for pair in pairs], shares) for side in (0, 1))
    width = len(mean_a) * len(pairs)
    left = np.hstack([*(p * (b - mean_b) for p, (b, _) in zip(shares, pairs, strict=True)), mean_b])
    right = np.vstack([*(a - mean_a for _, a in pairs), mean_a])
    products = (left.T @ left) * (right @ right.T)
    return float(products[:width, :width].sum()), float(products.sum())


def _estimated(
    current: Arrays, uploads: Sequence[Upload], names: tuple[str, str], probes: int
) -> tuple[float, float]:
    """Estimate the same by random probes Ω, in fp32.

    With the updates b_k of B and a_k of A and their means b and a, the difference is
    ``Σ p_k b_k a_k - b a``.
    """
    shares = normalize([upload.weight for upload in uploads]).astype(np.float32)
    start_b, start_a = (current[name] for name in names)
    drawn = np.random.default_rng(0).standard_normal((start_a.shape[1], probes), np.float32)
    answers = np.zeros((len(start_b), probes), np.float32)
    b, a = np.zeros_like(start_b, np.float32), np.zeros_like(start_a, np.float32)
    moved_b, moved_a = (np.zeros((_CLIENTS, *start.shape), np.float32) for start in (b, a))
    for first in range(0, len(uploads), _CLIENTS):
        weights = np.zeros(_CLIENTS, np.float32)
        for k, upload in enumerate(uploads[first : first + _CLIENTS]):
            weights[k] = shares[first + k]
            np.subtract(upload.arrays.get(names[0], start_b), start_b, out=moved_b[k])
            np.subtract(upload.arrays.get(names[1], start_a), start_a, out=moved_a[k])
        b += (weights @ moved_b.reshape(_CLIENTS, -1)).reshape(b.shape)
        a += (weights @ moved_a.reshape(_CLIENTS, -1)).reshape(a.shape)
        probed = (moved_a.reshape(-1, a.shape[1]) @ drawn).reshape(_CLIENTS, -1, probes)
        answers += (moved_b @ (weights[:, None, None] * probed)).sum(0)
    answers -= b @ (a @ drawn)
    b += start_b
    a += start_a
    means = b @ (a @ drawn)
    whole = float(np.vdot(b.T @ b, a @ a.T)) + 2 * float(np.vdot(means, answers)) / probes
    lost = float(np.vdot(answers, answers)) / probes
    return lost, whole + lost


def _mean(arrays: Sequence[NDArray[Any]], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros(arrays[0].shape)
    for share, array in zip(shares, arrays, strict=True):
        total += share * array.astype(np.float64)
    return total


def _cosine(
    current: Arrays, uploads: Sequence[Upload], names: Sequence[str], squares: NDArray[np.float64]
) -> float | None:
    """Return the mean cosine of all pairs, from the norm of the sum of unit vectors."""
    if not squares.all():
        return None
    together, count = _summed(current, uploads, names, 1 / np.sqrt(squares))[0], len(uploads)
    return (together - count) / (count * (count - 1))


def _summed(
    current: Arrays,
    uploads: Sequence[Upload],
    names: Sequence[str],
    factors: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """Return ``|Σ f_k Δ_k|²`` and each ``|Δ_k|²``, over some arrays taken as one vector."""
    together, squares = 0.0, np.zeros(len(uploads))
    # Updates are as exact as the clients' own arithmetic, and sums of many are in fp64.
    space, single = np.empty((_CLIENTS, _ENTRIES), np.float32), factors.astype(np.float32)
    for name in names:
        sent = [upload.arrays[name].ravel() for upload in uploads]
        start = current[name].ravel()
        for begin in range(0, start.size, _ENTRIES):
            here = start[begin : begin + _ENTRIES]
            total = np.zeros(here.size)
            for first in range(0, len(uploads), _CLIENTS):
                group = slice(first, first + _CLIENTS)
                updates = space[: len(sent[group]), : here.size]
                for k, entries in enumerate(sent[group]):
                    update = updates[k]
                    np.subtract(entries[begin : begin + _ENTRIES], here, out=update)
                    squares[first + k] += np.dot(update, update)
                total += single[group] @ updates
            together += float(np.dot(total, total))
    return together, squares
