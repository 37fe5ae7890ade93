"""The mean product of clients, cut to a rank, against the SVD of the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.algebra import factors
from fedlora_flwr.algebra.factors import truncated_mean
from tests.algebra.support import Array64, Pair, close, draw_pair, full_svd, mean_of_products

seeds = st.integers(0, 2**32 - 1)


def clients_of(
    seed: int, m: int, n: int, ranks: list[int], related: bool
) -> tuple[list[Pair], list[float]]:
    """Draw clients of different ranks and weights, close to one start or not."""
    rng = np.random.default_rng(seed)
    start, common = draw_pair(rng, m, n, max(ranks)), float(related)
    clients = []
    for rank in ranks:
        b, a = draw_pair(rng, m, n, rank)
        near = start[0][:, :rank], start[1][:rank]
        own = 0.1 if related else 1.0
        clients.append((common * near[0] + own * b, common * near[1] + own * a))
    return clients, rng.uniform(0.5, 3, len(ranks)).tolist()


@pytest.mark.parametrize("related", [True, False])
@given(seeds, st.integers(40, 90), st.integers(40, 90), st.lists(st.integers(1, 3), min_size=1))
@settings(max_examples=40)
def test_the_mean_is_cut_as_the_product_of_the_stack_is(
    related: bool, seed: int, m: int, n: int, ranks: list[int]
) -> None:
    clients, weights = clients_of(seed, m, n, ranks, related)
    whole = mean_of_products(clients, weights)
    _, sigma, _ = full_svd(whole)

    B, A = truncated_mean(clients, weights, 3)

    close(full_svd(whole - B @ A)[1][: len(sigma) - 3], sigma[3:], sigma[0])
    close(np.linalg.norm(B, axis=0), sigma[:3], sigma[0])
    single = truncated_mean([(b.astype("f4"), a.astype("f4")) for b, a in clients], weights, 3)
    assert {factor.dtype for factor in single} == {np.dtype(np.float32)}
    # What is lost by the cut is the same, up to the rounding of fp32.
    found = full_svd(whole - np.matmul(*(x.astype(np.float64) for x in single)))[1]
    close(found[: len(sigma) - 3], sigma[3:], sigma[0], 1e-5)


@pytest.mark.parametrize("tall", [True, False])
def test_a_product_of_high_rank_without_a_gap_needs_no_direct_svd(
    tall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, weights = clients_of(3, *((90, 70) if tall else (70, 90)), [2] * 60, related=False)
    u, sigma, vt = full_svd(mean_of_products(clients, weights))
    monkeypatch.setattr(factors, "_decompose", None)
    found = np.matmul(*truncated_mean(clients, weights, 2))
    close(found, (u[:, :2] * sigma[:2]) @ vt[:2], sigma[0])


def test_a_start_that_misses_the_leading_components_does_not_hide_them() -> None:
    """The mean of B spans smaller components alone, which an iteration never leaves."""
    rng, rank = np.random.default_rng(4), 10
    u, v = (orthonormal(rng, 300, 2 * rank) for _ in range(2))
    large, small = (u[:, :rank], v[:, :rank].T), (0.1 * u[:, rank:], v[:, rank:].T)
    B, A = truncated_mean([large, (-large[0], -large[1]), small], [1.0] * 3, rank)
    close(B @ A, 2 / 3 * large[0] @ large[1], 1.0)


def orthonormal(rng: np.random.Generator, size: int, count: int) -> Array64:
    return np.linalg.qr(rng.normal(size=(size, count)))[0]


def test_small_components_of_which_a_gram_matrix_knows_nothing_are_exact() -> None:
    rng = np.random.default_rng(5)
    sigma = np.concatenate([[1.0, 1e-8], np.full(38, 3e-9)])
    u, v = orthonormal(rng, 60, 40), orthonormal(rng, 50, 40)
    B, A = truncated_mean([(u * sigma, v.T)], [1.0], 2)
    close(np.linalg.norm(B, axis=0), sigma[:2], 1.0, 1e-12)
    close(B @ A, (u[:, :2] * sigma[:2]) @ v[:, :2].T, 1.0, 1e-10)


def test_components_of_equal_size_are_all_found() -> None:
    """LAPACK leaves out some of many equal eigenvalues in one of a few such matrices."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        u, v = orthonormal(rng, 60, 40), orthonormal(rng, 40, 40)
        B, A = truncated_mean([(u, v.T)], [1.0], 8)
        close(B.T @ B, np.eye(8), 1.0)
        close(A @ A.T, np.eye(8), 1.0)
