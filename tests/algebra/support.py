"""Products drawn at random, and the slow ways to take their means and their SVD."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Factor = NDArray[np.floating]
Array64 = NDArray[np.float64]
Pair = tuple[Array64, Array64]


def draw_pair(rng: np.random.Generator, m: int, n: int, r: int) -> Pair:
    return rng.normal(size=(m, r)), rng.normal(size=(r, n))


def full_svd(product: Array64) -> tuple[Array64, Array64, Array64]:
    """The slow way: the SVD of the m x n matrix."""
    u, sigma, vt = np.linalg.svd(product, full_matrices=False)
    return u, sigma, vt


def close(found: Factor, wanted: Factor, scale: float, tolerance: float = 1e-10) -> None:
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


def mean_of_products(clients: list[Pair], weights: list[float]) -> Array64:
    """Written independently of the code under test."""
    products = np.stack([B @ A for B, A in clients])
    return np.asarray(np.average(products, axis=0, weights=weights), dtype=np.float64)
