"""How far a round's uploads agree, and what averaging their factors loses.

The server works this out from uploads that it has anyway, so it costs no privacy. Updates are taken
one array at a time, so memory grows with the cohort by only a few numbers per client.
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

# Gram matrices are cheap up to _EXACT stacked columns. Above that, _PROBES random probes estimate.
_EXACT, _PROBES = 256, 32


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
        squares, mean = np.zeros(len(uploads)), 0.0
        for name in names:
            total = np.zeros(current[name].shape)
            for k, upload in enumerate(uploads):
                step = _update(current, upload, name)
                squares[k] += np.vdot(step, step)
                total += shares[k] * step
            mean += float(np.vdot(total, total))
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
    squares = np.sum([_squares(current, uploads, pair) for pair in pairs], axis=0)
    lost, whole = (math.sqrt(max(float(square), 0.0)) for square in squares)
    return lost / whole if whole else None


def _squares(
    current: Arrays, uploads: Sequence[Upload], names: tuple[str, str]
) -> tuple[float, float]:
    """Return the squared norms of one layer's difference and of its mean product."""
    shares = normalize([upload.weight for upload in uploads])
    pairs = [tuple(u.arrays.get(name, current[name]) for name in names) for u in uploads]
    mean_b, mean_a = (_mean([pair[side] for pair in pairs], shares) for side in (0, 1))
    rank = len(mean_a)
    width = rank * len(pairs)
    if width <= _EXACT:
        left = np.hstack(
            [*(p * (b - mean_b) for p, (b, _) in zip(shares, pairs, strict=True)), mean_b]
        )
        right = np.vstack([*(a - mean_a for _, a in pairs), mean_a])
        products = (left.T @ left) * (right @ right.T)
        return float(products[:width, :width].sum()), float(products.sum())
    probes = np.random.default_rng(0).standard_normal((mean_a.shape[1], _PROBES))
    answers, whole = np.zeros((len(mean_b), _PROBES)), _product(mean_b, mean_a, mean_b, mean_a)
    for share, (b, a) in zip(shares, pairs, strict=True):
        left, right = share * (b - mean_b), a - mean_a
        answers += left @ (right @ probes)
        whole += 2 * _product(mean_b, mean_a, left, right)
    lost = float(np.vdot(answers, answers)) / _PROBES
    return lost, whole + lost


def _product(
    b: NDArray[np.float64],
    a: NDArray[np.float64],
    left: NDArray[np.float64],
    right: NDArray[np.float64],
) -> float:
    """Return the inner product of ``b a`` and ``left right``."""
    return float(np.vdot(b.T @ left, a @ right.T))


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
    together, count = 0.0, len(uploads)
    for name in names:
        total = np.zeros(current[name].shape)
        for square, upload in zip(squares, uploads, strict=True):
            total += _update(current, upload, name) / math.sqrt(square)
        together += float(np.vdot(total, total))
    return (together - count) / (count * (count - 1))


def _update(current: Arrays, upload: Upload, name: str) -> NDArray[np.float64]:
    update: NDArray[np.float64] = upload.arrays[name].astype(np.float64) - current[name]
    return update
