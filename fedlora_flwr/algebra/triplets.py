"""The leading singular triplets of a product of factors, by ways that are faster than its SVD."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np

from fedlora_flwr.algebra.running_sum import Array64

Triplets: TypeAlias = tuple[Array64, Array64, Array64]
"""U (m, rank), Σ (rank,) and V (n, rank)."""

EXACT = 1e-13
"""What a direct SVD promises, as a part of the largest singular value."""
_SPARE = 8  # vectors of a subspace iteration beyond those that are looked for


def leading(
    B: Array64, A: Array64, rank: int, exact: float, sketch: Array64 | None = None
) -> Triplets | None:
    """Find the leading triplets of ``B A``.

    Parameters
    ----------
    B : ndarray, (m, r)
        Left factor, finite.
    A : ndarray, (r, n)
        Right factor, finite.
    rank : int
        How many to find.
    exact : float
        Largest error that a subspace iteration may leave, as a part of the largest singular value.
    sketch : ndarray, (rank, r), optional
        Combinations of B's columns from which the iteration starts.

    Returns
    -------
    tuple of ndarray or None
        ``None`` where only an SVD finds them.
    """
    (m, r), n = B.shape, A.shape[1]
    ways: list[Callable[[], Triplets | None]] = []
    if 4 * (rank + _SPARE) <= min(m, n):
        ways.append(partial(_iterated, B, A, rank, exact, sketch))
    if 2 * r >= min(m, n) >= 4 * rank:
        ways.append(partial(_of_gram, B, A, rank))
    # Two passes with a wide stack take more products than to form the matrix, if it is small.
    if r >= 2 * min(m, n) and 6 * (m + n) * (rank + _SPARE) > m * n:
        ways = ways[::-1]
    return next((found for way in ways if (found := way()) is not None), None)


def _iterated(
    B: Array64, A: Array64, rank: int, exact: float, sketch: Array64 | None
) -> Triplets | None:
    """Find the leading triplets by subspace iteration, if that is cheaper than an SVD.

    Halko, Martinsson and Tropp (arXiv 0909.4061, algorithm 4.4), from a fixed start. ``Pᵀu = v σ``
    holds by construction. Once ``|P v - u σ| <= exact σ_1``, the triplets are those of a matrix
    within this distance of P. A pass that gains less than two digits returns None: the singular
    values have no gap after the rank. Vectors are rows here, since products with the wide stacks
    are then up to twice as fast.

    Parameters
    ----------
    exact : float
        Largest error that may be left.
    sketch : ndarray, (rank, r), optional
        Combinations of B's columns to start from. Random ones are added to them.
    """
    start = np.random.default_rng(0).standard_normal((rank + _SPARE, len(A)))
    if sketch is not None:
        start[:rank] *= 1e-3 * np.linalg.norm(sketch) / np.linalg.norm(start[:rank])
        start[:rank] += sketch
    image, error = start @ B.T, np.inf
    while True:
        u = _orthonormal(image.T).T
        # QR first: the SVD of a small square takes less time than that of a tall matrix.
        v, rest = np.linalg.qr(((u @ B) @ A).T)
        turn, sigma, mix = np.linalg.svd(rest, full_matrices=False)
        v, mix = v @ turn, mix @ u
        image = (v.T @ A.T) @ B.T
        previous = min(error, float(sigma[0]))
        error = float(np.linalg.norm(image[:rank] - sigma[:rank, None] * mix[:rank]))
        if error <= exact * sigma[0]:
            return mix[:rank].T, sigma[:rank], v[:, :rank]
        if not error <= 0.01 * previous:
            return None


def _of_gram(B: Array64, A: Array64, rank: int) -> Triplets | None:
    """Find the leading triplets of the product P from ``P Pᵀ``, if that is as exact as its SVD.

    An eigenvalue is off by eps σ_1², so a singular value σ is off by eps σ_1² / σ. This is nothing
    as long as σ is not small. Where it is, the triplets do not pass the check.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        tall = len(B) > A.shape[1]
        P = (B @ A).T if tall else B @ A
        gram = P @ P.T
    if not np.isfinite(gram).all():
        return None
    if (u := _eigenvectors(gram, rank)).shape[1] < rank:
        return None
    u = _orthonormal(u)
    v, rest = np.linalg.qr(P.T @ u)
    turn, sigma, mix = np.linalg.svd(rest, full_matrices=False)
    u, v = u @ mix.T, v @ turn
    if np.linalg.norm(P @ v - u * sigma) > EXACT * sigma[0]:
        return None
    return (v, sigma, u) if tall else (u, sigma, v)


def _eigenvectors(gram: Array64, count: int) -> Array64:
    """Return those of the largest eigenvalues. LAPACK may leave out some of many equal ones.

    The core has no SciPy, which takes less than half of NumPy's time: it leaves the others out.
    """
    try:
        from scipy.linalg import eigh  # type: ignore[import-untyped]
    except ImportError:
        return np.linalg.eigh(gram)[1][:, -count:]
    size = len(gram)
    found: Array64 = eigh(gram, subset_by_index=(size - count, size - 1))[1]
    return found


def _orthonormal(columns: Array64) -> Array64:
    return np.linalg.qr(columns)[0]
