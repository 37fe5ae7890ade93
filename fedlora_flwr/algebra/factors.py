"""Arithmetic on pairs of LoRA factors, ``B`` (m x r) and ``A`` (r x n), not on their product.

The product of m x n entries is formed in one case only, to compute its SVD: r >= max(m, n), where
it is smaller than its factors.

Sums, QR and SVD run in fp64; results come back in the factors' own type. Every function raises
`InvalidValue` for factors that do not fit together, are not finite or not floating-point, and for
results outside the range of their type.

A singular value is set to zero when it is at most ``max(m, n) * eps * sum_j |b_j| |a_j|``. Here b_j
are the columns of B, a_j the rows of A, and eps is that of fp64. A smaller value is the rounding
error of the product's terms. Unlike ``|B| |A|``, the sum stays the same if a column of B is scaled
up and its row of A is scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import normalize
from fedlora_flwr.algebra.running_sum import Array64
from fedlora_flwr.algebra.triplets import EXACT, leading
from fedlora_flwr.errors import InvalidValue

Factor: TypeAlias = NDArray[np.floating]
Pair: TypeAlias = tuple[Factor, Factor]

_HIDDEN = 1e-9  # of the largest singular value; far below the rounding of fp32


def refactorize(B: Factor, A: Factor) -> Pair:
    """Write the product as ``B' = U Σ`` and ``A' = Vᵀ``, its SVD, so that ``A'A'ᵀ = I``.

    The server step of FedSVD (arXiv 2505.12805). QR of B and of Aᵀ, then SVD of the r x r core:
    O((m + n) r² + r³). Singular values descend. In each row of A' the largest entry is positive (or
    the first of several that are equal up to 1e-6). So equal products give equal factors wherever
    singular values are positive and distinct.

    Returns
    -------
    tuple of ndarray, (m, r) and (r, n)
        B has orthogonal columns, which are zero beyond the product's rank. All rows of A are
        orthonormal, also beyond the rank; if r > n, only the first n are, and the others are zero.
    """
    _check(B, A)
    left, right, _ = _decompose(B, A, A.shape[0], _rounding(B, A))
    return _cast(left, right, (B, A))


def compact(B: Factor, A: Factor) -> Pair:
    """Write the product in as few columns as it needs: `refactorize`'s form without its zeros.

    A sum of many pairs (`add`) is kept in this form: its rank grows with its content, but never
    beyond min(m, n). Each call drops at most the module's bound, so a product built up over T calls
    is off by at most T times that bound, plus rounding. O((m + n) r² + r³) for r below m and n.

    Returns
    -------
    tuple of ndarray, (m, q) and (q, n)
        q, the numerical rank, is 0 for a product of zero.
    """
    _check(B, A)
    return _cast(*_compress(B, A, _rounding(B, A)), (B, A))


def truncate(B: Factor, A: Factor, rank: int) -> Pair:
    """Find the best approximation of the product that has at most the given rank (Eckart-Young).

    The server step of FlexLoRA (arXiv 2402.11505), which cuts one sum to each client's rank. The
    form is `refactorize`'s, ``U Σ`` and ``Vᵀ``, not the balanced ``U √Σ`` and ``√Σ Vᵀ``. So A is
    perfectly conditioned for any product, and a component with Σ = 0 still trains, as at LoRA's
    own start. In the balanced form both of its gradients would be zero.

    If the rank is far below m and n and the singular values beyond it are small, as for clients
    that moved little from one start, a few passes of a subspace iteration suffice, each in
    O((m + n) r rank). Otherwise, a product of high rank is formed, and the eigenvectors of its Gram
    matrix are taken where they are as exact as its SVD. What is left takes QR and SVD,
    O((m + n) k² + k³), with k = max(r, rank).

    Parameters
    ----------
    B, A : ndarray, (m, r) and (r, n)
    rank : int
        Columns of the new B, at least 1; beyond the product's rank B is padded with zeros and A
        with orthonormal rows.

    Returns
    -------
    tuple of ndarray, (m, rank) and (rank, n)
        The singular values of the error are those that were left out.
    """
    _check(B, A)
    _check_rank(rank)
    stack = B.astype(np.float64), A.astype(np.float64)
    return _cast(*_truncate(*stack, rank, EXACT), (B, A))


def truncated_mean(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """Cut the mean product ``Σ p_k B_k A_k`` to a rank: `truncate` of what `combine` stacks.

    Nothing is rounded to the pairs' type in between. Where that is fp32 or less, the subspace
    iteration ends at an error that rounding the result would hide. It starts from the mean of the
    B_k, which for clients of one start is close to what is looked for.

    Parameters
    ----------
    pairs : sequence of (B, A), (m, r_k) and (r_k, n)
        One pair per client; ranks may differ.
    weights : Sequence[float]
        One weight per client; they are scaled to sum to one (p_k).
    rank : int
        Columns of the new B, at least 1.

    Returns
    -------
    tuple of ndarray, (m, rank) and (rank, n)
        As of `truncate`.
    """
    shares = _shares(pairs, weights)
    _check_rank(rank)
    factors = [factor for pair in pairs for factor in pair]
    width = np.result_type(*factors).itemsize
    stack = _stack([B for B, _ in pairs], [A for _, A in pairs], shares)
    columns = np.concatenate([np.arange(len(A)) for _, A in pairs])
    sizes = np.repeat(shares, [len(A) for _, A in pairs])
    mean = np.zeros((rank, len(columns)))
    own = columns < rank
    mean[columns[own], np.flatnonzero(own)] = sizes[own]
    return _cast(*_truncate(*stack, rank, EXACT if width > 4 else _HIDDEN, mean), factors)


def combine(
    pairs: Sequence[Pair], weights: Sequence[float], scalings: Sequence[float] | None = None
) -> Pair:
    """Stack the pairs so that the product is ``Σ p_k s_k B_k A_k``, exactly; O((m + n) Σ r_k).

    Parameters
    ----------
    pairs : sequence of (B, A), (m, r_k) and (r_k, n)
        One pair per client; ranks may differ.
    weights : Sequence[float]
        One weight per client; they are scaled to sum to one (p_k).
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


def add(pairs: Sequence[Pair]) -> Pair:
    """Stack the pairs as they are, so that the product is the plain sum ``Σ B_k A_k``, exactly.

    Parameters
    ----------
    pairs : sequence of (B, A), (m, r_k) and (r_k, n)
        At least one pair; ranks may differ and may be 0.

    Returns
    -------
    tuple of ndarray, (m, Σ r_k) and (Σ r_k, n)
        ``[B_1 … B_N]`` and ``[A_1; …; A_N]``.
    """
    _shares(pairs, [1.0] * len(pairs))
    return np.hstack([B for B, _ in pairs]), np.vstack([A for _, A in pairs])


def residual(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Factor what the means of the factors miss, ``Σ p_k B_k A_k - B̄ Ā``.

    The residual of FedEx-LoRA (arXiv 2410.09432), taken as the equal ``Σ p_k (B_k - B̄)(A_k - Ā)``:
    no large terms cancel when clients differ little, and its rank is at most (N - 1) r. QR and SVD
    compress it to its numerical rank. The module's bound, with the terms of ``Σ p_k B_k A_k``,
    decides which singular values count as zero. All pairs must have the same rank.
    O((m + n)(N r)² + (N r)³).

    Returns
    -------
    tuple of ndarray, (m, q) and (q, n)
        In `refactorize`'s form; q, the numerical rank, is 0 when clients agree on a factor.
    """
    shares = _shares(pairs, weights)
    ranks = [B.shape[1] for B, _ in pairs]
    if len(set(ranks)) > 1:
        raise InvalidValue("ranks", ranks, "one rank for all, else the factors have no mean")
    stacks = [np.stack([pair[side].astype(np.float64) for pair in pairs]) for side in (0, 1)]
    floor = _rounding(*_stack(list(stacks[0]), list(stacks[1]), shares))
    # Rounding of a mean shifts every client alike, so it affects the sum in second order only.
    off_b, off_a = (list(stack - np.tensordot(shares, stack, axes=1)) for stack in stacks)
    B, A = _stack(off_b, off_a, shares)
    return _cast(*_compress(B, A, floor), [factor for pair in pairs for factor in pair])


def spectrum(B: Factor, A: Factor) -> Factor:
    """List the min(m, n, r) leading singular values of the product, descending; O((m + n) r²)."""
    _check(B, A)
    sigma = _decompose(B, A, A.shape[0], _rounding(B, A))[2]
    return _cast(sigma, sigma, (B, A))[0]


def _compress(B: Factor, A: Factor, floor: float) -> tuple[Array64, Array64]:
    left, right, sigma = _decompose(B, A, min(*B.shape, A.shape[1]), floor)
    rank = np.count_nonzero(sigma)
    return left[:, :rank], right[:rank]


def _decompose(B: Factor, A: Factor, rank: int, floor: float) -> tuple[Array64, Array64, Array64]:
    """Return U Σ (m, rank), Vᵀ (rank, n) and Σ (min(m, n, r),), with values <= floor set to 0."""
    (m, r), n = B.shape, A.shape[1]
    left, right = B.astype(np.float64), A.astype(np.float64)
    basis = rest = None
    if r < n:  # Otherwise QR would not make A smaller.
        # QR of the rows of zeros completes the basis.
        padded = np.vstack([right, np.zeros((max(rank - r, 0), n))])
        q_a, r_a = np.linalg.qr(padded.T)
        inner = min(n, r)
        right, basis, rest = r_a[:inner, :r].T, q_a[:, :inner].T, q_a[:, inner:].T
    with np.errstate(over="ignore", invalid="ignore"):
        core = (np.linalg.qr(left, "r") if r < m else left) @ right
    if not (np.isfinite(floor) and np.isfinite(core).all()):
        raise InvalidValue("product", "infinite", "factors and a product within fp64's range")
    u, sigma, vt = np.linalg.svd(core, full_matrices=rank > len(core))
    kept = min(rank, sigma.size)
    # For a tall B the Q of its QR is not needed, which saves half of the cost.
    left = left @ (right @ vt[:kept].T) if r < m else u[:, :kept] * sigma[:kept]
    v = vt if basis is None or rest is None else np.vstack([vt @ basis, rest])
    sigma = np.where(sigma > floor, sigma, 0.0)
    return *_oriented(left * (sigma[:kept] > 0), v[:rank], rank), sigma


def _truncate(
    B: Array64, A: Array64, rank: int, exact: float, sketch: Array64 | None = None
) -> tuple[Array64, Array64]:
    floor = _rounding(B, A)
    found = leading(B, A, rank, exact, sketch) if np.isfinite(floor) else None
    if found is None:
        return _decompose(B, A, rank, floor)[:2]
    u, sigma, v = found
    return _oriented(u * np.where(sigma > floor, sigma, 0.0), v.T, rank)


def _oriented(left: Array64, v: Array64, rank: int) -> tuple[Array64, Array64]:
    """Fix the signs as `refactorize` describes, and pad with zeros to the rank."""
    size = np.abs(v)
    peak = np.argmax(size >= (1 - 1e-6) * size.max(axis=1, keepdims=True), axis=1)
    signs = np.where(v[np.arange(len(v)), peak] < 0, -1.0, 1.0)
    kept = left.shape[1]
    left = np.pad(left * signs[:kept], ((0, 0), (0, rank - kept)))
    return left, np.pad(v * signs[:, None], ((0, rank - len(v)), (0, 0)))


def _rounding(B: Factor, A: Factor) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        columns = np.sqrt(np.einsum("ij,ij->j", B, B, dtype=np.float64))
        rows = np.sqrt(np.einsum("ij,ij->i", A, A, dtype=np.float64))
        return float(max(len(B), A.shape[1]) * np.finfo(np.float64).eps * (columns @ rows))


def _stack(Bs: Sequence[Factor], As: Sequence[Factor], shares: Array64) -> tuple[Array64, Array64]:
    ends = np.cumsum([len(A) for A in As])
    B, A = np.empty((len(Bs[0]), ends[-1])), np.empty((ends[-1], As[0].shape[1]))
    for left, right, share, end in zip(Bs, As, shares, ends, strict=True):
        place = slice(end - len(right), end)
        B[:, place] = left
        A[place] = right
        A[place] *= share
    return B, A


def _shares(pairs: Sequence[Pair], weights: Sequence[float]) -> Array64:
    shares = normalize(weights)
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


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise InvalidValue("rank", rank, "a whole number of at least 1")


def _cast(B: Array64, A: Array64, sources: Sequence[Factor]) -> Pair:
    dtype = np.result_type(*sources)
    with np.errstate(over="ignore"):
        cast = B.astype(dtype), A.astype(dtype)
    if not all(np.isfinite(factor).all() for factor in cast):
        raise InvalidValue("result", "infinite", f"factors within the range of {dtype}")
    return cast
