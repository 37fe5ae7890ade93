"""Pure NumPy on pairs of LoRA factors, ``B`` (m x r) and ``A`` (r x n), never on their product.

Sums, QR and SVD run in fp64; results come back in the factors' own type. Every function raises
`InvalidValue` for factors that do not fit together, are not finite or not floating-point, and for
results outside the range of their type.

A singular value is set to zero when it is at most ``max(m, n) * eps * sum_j |b_j| |a_j|``, with the
columns of B, the rows of A and the eps of fp64: below that it is the rounding of the product's
terms. The sum, unlike ``|B| |A|``, does not depend on how a term is shared between its two vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.aggregation import normalise
from fedlora_flwr.errors import InvalidValue

Factor: TypeAlias = NDArray[np.floating]
Pair: TypeAlias = tuple[Factor, Factor]
Array64: TypeAlias = NDArray[np.float64]


def refactorise(B: Factor, A: Factor) -> Pair:
    """Write the product as ``B' = U Σ`` and ``A' = Vᵀ``, its SVD, so that ``A'A'ᵀ = I``.

    The server step of FedSVD (arXiv 2505.12805). QR of B and of Aᵀ, then SVD of the r x r core:
    O((m + n) r² + r³). Singular values descend. In each row of A' the largest entry (of entries
    tied to 1e-6, the first) is positive, so that equal products give equal factors wherever
    singular values are positive and distinct.

    Returns
    -------
    tuple of ndarray, (m, r) and (r, n)
        B has orthogonal columns, zero beyond the product's rank. A has orthonormal rows, also
        there; if r > n, only n can be and the last r - n are zero.
    """
    _check(B, A)
    left, _, right = _decompose(B, A, A.shape[0], _rounding(B, A))
    return _cast(left, right, (B, A))


def truncate(B: Factor, A: Factor, rank: int) -> Pair:
    """Find the best approximation of the product that has at most the given rank (Eckart-Young).

    The server step of FlexLoRA (arXiv 2402.11505), which cuts one sum to each client's rank. The
    form is `refactorise`'s, ``U Σ`` and ``Vᵀ``, not the balanced ``U √Σ`` and ``√Σ Vᵀ``: A is
    perfectly conditioned whatever the product, and a component with Σ = 0 still trains, as at
    LoRA's own start (balanced, both gradients are zero). O((m + n) k² + k³), k = max(r, rank).

    Parameters
    ----------
    B, A : ndarray, (m, r) and (r, n)
    rank : int
        Columns of the new B, at least 1; beyond the product's rank B is padded with zeros and A
        with orthonormal rows.

    Returns
    -------
    tuple of ndarray, (m, rank) and (rank, n)
        The singular values left out are those of the error.
    """
    _check(B, A)
    if rank < 1:
        raise InvalidValue("rank", rank, "a whole number of at least 1")
    left, _, right = _decompose(B, A, rank, _rounding(B, A))
    return _cast(left, right, (B, A))


def combine(
    pairs: Sequence[Pair], weights: Sequence[float], scalings: Sequence[float] | None = None
) -> Pair:
    """Stack the pairs so that the product is ``Σ p_k s_k B_k A_k``, exactly; O((m + n) Σ r_k).

    Parameters
    ----------
    pairs : sequence of (B, A), (m, r_k) and (r_k, n)
        One pair a client; ranks may differ.
    weights : Sequence[float]
        One weight a client; they are scaled to sum to one (p_k).
    scalings : Sequence[float], optional
        LoRA's alpha / r of each client (s_k); all one if left out.

    Returns
    -------
    tuple of ndarray, (m, Σ r_k) and (Σ r_k, n)
        ``[B_1 … B_N]`` and ``[p_1 s_1 A_1; …; p_N s_N A_N]``, as in FLoRA (arXiv 2409.05976).
    """
    shares = _shares(pairs, weights)
    if scalings is not None:
        if len(scalings) != len(pairs) or not np.isfinite(scalings).all():
            raise InvalidValue("scalings", list(scalings), f"{len(pairs)} finite numbers")
        shares = shares * np.asarray(scalings, dtype=np.float64)
    B, A = _stack([B for B, _ in pairs], [A for _, A in pairs], shares)
    return _cast(B, A, [factor for pair in pairs for factor in pair])


def residual(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Factor what the means of the factors miss, ``Σ p_k B_k A_k - B̄ Ā``.

    The residual of FedEx-LoRA (arXiv 2410.09432), taken as the equal ``Σ p_k (B_k - B̄)(A_k - Ā)``:
    nothing large cancels when clients differ little, and its rank is at most (N - 1) r. QR and SVD
    compress it to its numerical rank: the module's bound, with the terms of ``Σ p_k B_k A_k``, says
    what counts as zero. Pairs must have one rank. O((m + n)(N r)² + (N r)³).

    Returns
    -------
    tuple of ndarray, (m, q) and (q, n)
        In `refactorise`'s form; q, the numerical rank, is 0 when clients agree on a factor.
    """
    shares = _shares(pairs, weights)
    ranks = [B.shape[1] for B, _ in pairs]
    if len(set(ranks)) > 1:
        raise InvalidValue("ranks", ranks, "one rank for all, else the factors have no mean")
    stacks = [np.stack([pair[side].astype(np.float64) for pair in pairs]) for side in (0, 1)]
    floor = _rounding(*_stack(list(stacks[0]), list(stacks[1]), shares))
    # An error of a mean shifts every client alike, so it enters the sum in second order only.
    off_b, off_a = (list(stack - np.tensordot(shares, stack, axes=1)) for stack in stacks)
    B, A = _stack(off_b, off_a, shares)
    left, sigma, right = _decompose(B, A, A.shape[0], floor)
    rank = np.count_nonzero(sigma)
    return _cast(left[:, :rank], right[:rank], [factor for pair in pairs for factor in pair])


def spectrum(B: Factor, A: Factor) -> Factor:
    """List the min(m, n, r) leading singular values of the product, descending; O((m + n) r²)."""
    _check(B, A)
    sigma = _decompose(B, A, A.shape[0], _rounding(B, A))[1]
    return _cast(sigma, sigma, (B, A))[0]


def _decompose(B: Factor, A: Factor, rank: int, floor: float) -> tuple[Array64, Array64, Array64]:
    """Give U Σ (m, rank), Σ (min(m, n, r),) and Vᵀ (rank, n), singular values <= floor as zero."""
    (m, r), n = B.shape, A.shape[1]
    q_b, r_b = np.linalg.qr(B.astype(np.float64))
    padded = np.vstack([A, np.zeros((max(rank - r, 0), n))])  # QR completes the basis there.
    q_a, r_a = np.linalg.qr(padded.T)
    inner = min(n, r)
    with np.errstate(over="ignore", invalid="ignore"):
        core = r_b @ r_a[:inner, :r].T
    if not (np.isfinite(floor) and np.isfinite(core).all()):
        raise InvalidValue("product", "infinite", "factors and a product within fp64's range")
    u, sigma, vt = np.linalg.svd(core)
    sigma = np.where(sigma > floor, sigma, 0.0)
    v = np.vstack([vt @ q_a[:, :inner].T, q_a[:, inner:].T])
    size = np.abs(v)
    peak = np.argmax(size >= (1 - 1e-6) * size.max(axis=1, keepdims=True), axis=1)
    signs = np.where(v[np.arange(len(v)), peak] < 0, -1.0, 1.0)
    left, right, kept = np.zeros((m, rank)), np.zeros((rank, n)), min(rank, sigma.size)
    left[:, :kept] = q_b @ (u[:, :kept] * (sigma * signs[: sigma.size])[:kept])
    right[: len(v)] = (v * signs[:, None])[:rank]
    return left, sigma, right


def _rounding(B: Factor, A: Factor) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        columns = np.linalg.norm(B.astype(np.float64), axis=0)
        rows = np.linalg.norm(A.astype(np.float64), axis=1)
        return float(max(len(B), A.shape[1]) * np.finfo(np.float64).eps * (columns @ rows))


def _stack(Bs: Sequence[Factor], As: Sequence[Factor], shares: Array64) -> tuple[Array64, Array64]:
    rows = [share * A.astype(np.float64) for share, A in zip(shares, As, strict=True)]
    return np.hstack(Bs).astype(np.float64), np.vstack(rows)


def _shares(pairs: Sequence[Pair], weights: Sequence[float]) -> Array64:
    shares = normalise(weights)
    if len(shares) != len(pairs):
        raise InvalidValue("weights", list(weights), f"one for each of {len(pairs)} pairs")
    for B, A in pairs:
        _check(B, A)
    shapes = [(B.shape[0], A.shape[1]) for B, A in pairs]
    if len(set(shapes)) > 1:
        raise InvalidValue("shapes of the products", shapes, "one shape for all")
    return shares


def _check(B: Factor, A: Factor) -> None:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not (len(B) and A.shape[1]):
        raise InvalidValue("shapes of B and A", (B.shape, A.shape), "(m, r) and (r, n)")
    for name, factor in (("B", B), ("A", A)):
        if not np.issubdtype(factor.dtype, np.floating):
            raise InvalidValue(f"type of {name}", str(factor.dtype), "a floating-point type")
        if not np.isfinite(factor).all():
            raise InvalidValue(f"entries of {name}", "NaN or infinite", "finite numbers")


def _cast(B: Array64, A: Array64, sources: Sequence[Factor]) -> Pair:
    dtype = np.result_type(*sources)
    with np.errstate(over="ignore"):
        cast = B.astype(dtype), A.astype(dtype)
    if not all(np.isfinite(factor).all() for factor in cast):
        raise InvalidValue("result", "infinite", f"factors within the range of {dtype}")
    return cast
