from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray

from fedlora_flwr.algebra import factors
from fedlora_flwr.algebra.factors import (
    add,
    combine,
    compact,
    refactorize,
    residual,
    spectrum,
    truncate,
    truncated_mean,
)
from fedlora_flwr.algebra.means import weighted_mean
from fedlora_flwr.errors import InvalidValue
from tests.algebra.support import (
    Array64,
    Pair,
    close,
    draw_pair,
    full_svd,
    mean_of_products,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
weight_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Factors of every kind: r below and above m and n, rank-deficient, zero, unevenly scaled."""
    m, n, r = draw(sizes), draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(seeds))
    B, A = draw_pair(rng, m, n, r)
    kind = draw(st.sampled_from(["plain", "zero B", "deficient", "repeated", "uneven"]))
    if kind == "zero B":
        B[:] = 0
    elif kind == "deficient":
        B[:, -1], A[-1] = B[:, 0], 2 * A[0]
    elif kind == "repeated":
        r = min(m, n, r)
        B, A = 3 * np.linalg.qr(rng.normal(size=(m, r)))[0], np.eye(r, n)
    elif kind == "uneven":
        scale = 10.0 ** rng.uniform(-8, 8, size=r)
        B, A = B * scale, A / scale[:, None]
    return B, A


@given(pairs())
def test_refactorizing_is_the_full_svd(pair: Pair) -> None:
    (m, r), n = pair[0].shape, pair[1].shape[1]
    product = pair[0] @ pair[1]
    _, sigma, _ = full_svd(product)

    B, A = refactorize(*pair)

    assert B.shape == (m, r)
    assert A.shape == (r, n)
    close(B @ A, product, sigma[0])
    close(A @ A.T, np.diag((np.arange(r) < n).astype(float)), 1)
    wanted = np.zeros(r)
    wanted[: min(m, n, r)] = sigma[:r]
    close(np.linalg.norm(B, axis=0), wanted, sigma[0])
    close(B.T @ B, np.diag(wanted**2), sigma[0] ** 2)
    close(spectrum(*pair), wanted[: min(m, n, r)], sigma[0])
    np.testing.assert_array_equal(np.diff(spectrum(*pair)) <= 0, True)


@given(pairs(), st.integers(1, 12))
def test_truncation_is_the_best_approximation(pair: Pair, rank: int) -> None:
    product = pair[0] @ pair[1]
    u, sigma, vt = full_svd(product)

    B, A = truncate(*pair, rank)

    assert B.shape == (len(product), rank)
    assert A.shape == (rank, product.shape[1])
    close(full_svd(product - B @ A)[1][: len(sigma[rank:])], sigma[rank:], sigma[0])
    assert np.linalg.norm(product - B @ A) == pytest.approx(
        np.linalg.norm(sigma[rank:]), abs=1e-10 * sigma[0]
    )
    close(A @ A.T, np.diag((np.arange(rank) < product.shape[1]).astype(float)), 1)
    if rank >= len(sigma) or sigma[rank - 1] - sigma[rank] > 1e-3 * sigma[0]:
        close(B @ A, (u[:, :rank] * sigma[:rank]) @ vt[:rank], sigma[0])
    true_rank = np.count_nonzero(sigma > 1e-11 * sigma[0])
    assert not B[:, true_rank:].any()


@given(pairs(), seeds)
def test_equal_products_give_equal_factors(pair: Pair, seed: int) -> None:
    B, A = pair
    sigma = full_svd(B @ A)[1][: B.shape[1]]
    mix = np.linalg.qr(np.random.default_rng(seed).normal(size=(B.shape[1],) * 2))[0]
    if np.linalg.norm(B) * np.linalg.norm(A) > 1e4 * sigma[0]:
        mix = -np.eye(B.shape[1])[::-1]  # A dense mixture would lose the digits of uneven terms.

    (b_1, a_1), (b_2, a_2) = refactorize(B, A), refactorize(B @ mix, mix.T @ A)

    gaps = -np.diff(sigma, append=0.0)
    for i in range(len(sigma)):
        if min(gaps[max(i - 1, 0) : i + 1]) > 1e-2 * sigma[0]:
            close(b_1[:, i], b_2[:, i], sigma[0], 1e-9)
            close(a_1[i], a_2[i], 1, 1e-9)


def test_the_first_of_tied_entries_is_positive() -> None:
    A = np.array([[-1.0, 1.0 + 1e-12, 0.5]])
    B = np.array([[2.0], [1.0]])
    for sign in (1.0, -1.0):
        b, a = refactorize(sign * B, A)
        close(a, -A / np.linalg.norm(A), 1)
        close(b, -sign * B * np.linalg.norm(A), 1)


@given(sizes, sizes, st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds)
def test_combining_is_exact_for_different_ranks(m: int, n: int, ranks: list[int], s: int) -> None:
    rng = np.random.default_rng(s)
    clients = [draw_pair(rng, m, n, r) for r in ranks]
    weights, scalings = rng.uniform(0.1, 9, len(ranks)), rng.uniform(0.1, 9, len(ranks))

    B, A = combine(clients, list(weights), list(scalings))
    plain = combine(clients, list(weights))

    scaled = [(s * b, a) for s, (b, a) in zip(scalings, clients, strict=True)]
    wanted = mean_of_products(scaled, list(weights))
    assert B.shape == (m, sum(ranks))
    close(B @ A, wanted, np.abs(B).max() * np.abs(A).max() * sum(ranks), 1e-14)
    close(plain[0] @ plain[1], mean_of_products(clients, list(weights)), 1, 1e-12)
    sigma = full_svd(wanted)[1]
    for rank in ranks:
        error = wanted - np.matmul(*truncate(B, A, rank))
        assert np.linalg.norm(error) == pytest.approx(
            np.linalg.norm(sigma[rank:]), abs=1e-10 * sigma[0]
        )


@given(sizes, sizes, sizes, weight_lists, st.floats(-10, 0), seeds)
def test_residual_restores_the_mean_of_products(
    m: int, n: int, r: int, weights: list[float], spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start = draw_pair(rng, m, n, r)
    clients = [
        (start[0] + 10**spread * b, start[1] + 10**spread * a)
        for b, a in (draw_pair(rng, m, n, r) for _ in weights)
    ]
    mean = weighted_mean([{"A": a, "B": b} for b, a in clients], weights)

    B, A = residual(clients, weights)

    assert B.shape[1] == A.shape[0] <= min(m, n, (len(weights) - 1) * r)
    wanted = mean_of_products(clients, weights)
    close(mean["B"] @ mean["A"] + B @ A, wanted, np.abs(wanted).max() + r, 1e-12)
    close(A @ A.T, np.eye(len(A)), 1)
    assert (np.linalg.norm(B, axis=0) > 0).all()


@given(pairs())
def test_compacting_drops_what_is_zero_and_nothing_else(pair: Pair) -> None:
    product = pair[0] @ pair[1]
    sigma = full_svd(product)[1]

    B, A = compact(*pair)

    assert B.shape == (len(product), np.count_nonzero(sigma > 1e-11 * sigma[0]))
    assert A.shape == (B.shape[1], product.shape[1])
    close(B @ A, product, sigma[0])
    close(A @ A.T, np.eye(len(A)), 1)
    close(np.linalg.norm(B, axis=0), sigma[: len(A)], sigma[0])
    whole = refactorize(*pair)
    close(B, whole[0][:, : len(A)], sigma[0])
    assert not whole[0][:, len(A) :].any()


@given(sizes, sizes, st.lists(st.integers(0, 9), min_size=1, max_size=5), seeds)
def test_adding_is_the_plain_sum(m: int, n: int, ranks: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    summands = [draw_pair(rng, m, n, r) for r in ranks]

    B, A = add(summands)

    assert B.shape == (m, sum(ranks))
    close(B @ A, sum((b @ a for b, a in summands), np.zeros((m, n))), 1, 1e-12)
    assert all(np.shares_memory(B, b) is False for b, _ in summands)


@pytest.mark.parametrize(("m", "n"), [(30, 20), (16, 48)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_sum_over_rounds_does_not_drift(m: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(7)
    total: Pair = (np.zeros((m, 0)), np.zeros((0, n)))
    dense = np.zeros((m, n))
    for server_round in range(50):
        new = draw_pair(rng, m, n, 3)
        new = (new[0] * scale ** (server_round / 49), new[1])
        B, A = compact(*add([total, new]))
        total, dense = (np.asarray(B), np.asarray(A)), dense + new[0] @ new[1]
        assert B.shape[1] == len(A) == min(m, n, 3 * (server_round + 1))
        close(B @ A, dense, full_svd(dense)[1][0], 1e-12)
    B, A = compact(*add([total, (-total[0], total[1])]))
    assert B.shape == (m, 0)


def with_spectrum(
    rng: np.random.Generator, m: int, n: int, r: int, sigma: Array64, mix: bool
) -> Pair:
    """A product with the given singular values, its r columns mixed or one component each."""
    u, v = (np.linalg.qr(rng.normal(size=(size, len(sigma))))[0] for size in (m, n))
    blend = rng.normal(size=(len(sigma), r)) if mix else np.eye(len(sigma), r)
    return (u * sigma) @ blend, np.linalg.pinv(blend) @ v.T


SPECTRA: dict[str, Callable[[Array64, int], Array64]] = {
    "gap": lambda i, rank: np.where(i < rank, 1.0, 1e-3) / (1 + 0.01 * i),
    "gap of 14": lambda i, rank: np.where(i < rank, 1.0, 0.07),
    "gap of 25": lambda i, rank: np.where(i < rank, 1.0, 0.04),
    "exact rank": lambda i, rank: (i < rank).astype(float),
    "below rank": lambda i, rank: (2 * i + 2 < rank).astype(float),
    "zero": lambda i, _: 0.0 * i,
    "flat": lambda i, _: np.ones_like(i),
    "tie at the rank": lambda i, rank: np.where(i < rank + 2, 1.0, 1e-4),
    "tie of twenty": lambda i, rank: np.where(i < rank + 20, 1.0, 1e-4),
    "steep": lambda i, _: 10.0**-i,
    "slow": lambda i, _: 0.9**i,
    "tiny tail": lambda i, rank: np.where(i < rank, 10.0**-i, 1e-9),
    "one large, flat tail": lambda i, _: np.where(i < 1, 1.0, 1e-7),
}


@pytest.mark.parametrize("kind", SPECTRA)
@given(st.integers(1, 4), st.integers(48, 90), st.integers(48, 90), st.booleans(), seeds)
@settings(max_examples=15)
def test_truncating_wide_stacks_is_the_best_approximation(
    kind: str, rank: int, m: int, n: int, mix: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = min(m, n)
    sigma = SPECTRA[kind](np.arange(count, dtype=np.float64), rank)
    pair = with_spectrum(rng, m, n, count + int(rng.integers(0, 60)), sigma, mix)
    product, top = pair[0] @ pair[1], sigma[0]

    B, A = truncate(*pair, rank)

    close(np.linalg.norm(B, axis=0), sigma[:rank], top)
    close(A @ A.T, np.eye(rank), 1)
    close(B.T @ B, np.diag(sigma[:rank] ** 2), top**2)
    close(full_svd(product - B @ A)[1][: count - rank], sigma[rank:], top)
    slow_b, slow_a = factors._decompose(*pair, rank, factors._rounding(*pair))[:2]
    if sigma[rank - 1] - sigma[rank] > 1e-3 * top:
        close(B @ A, slow_b @ slow_a, top)
    assert (np.linalg.norm(B, axis=0) > 0).tolist() == (sigma[:rank] > 0).tolist()


def test_leading_components_far_from_the_first_rows_are_found() -> None:
    sigma = np.arange(1.0, 61.0)
    sigma[-2:] = [1e4, 2e4]
    B, A = truncate(np.diag(sigma), np.eye(60), 2)
    close(B @ A, np.diag(np.where(sigma > 100, sigma, 0)), 2e4)


def test_terms_that_cancel_leave_what_rounding_leaves() -> None:
    rng = np.random.default_rng(2)
    (B, A), move = draw_pair(rng, 60, 50, 30), rng.normal(size=(30, 50))
    pair = np.hstack([B, -B]), np.vstack([A + 1e-8 * move, A])
    u, sigma, vt = full_svd(1e-8 * B @ move)
    close(np.matmul(*truncate(*pair, 2)), (u[:, :2] * sigma[:2]) @ vt[:2], sigma[0], 1e-5)


def test_clients_close_to_one_start_need_no_direct_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    start = draw_pair(rng, 90, 70, 2)
    clients = [
        (start[0] + 0.1 * b, start[1] + 0.1 * a)
        for b, a in (draw_pair(rng, 90, 70, 2) for _ in range(40))
    ]
    stack = combine(clients, [1.0] * 40)
    slow = factors._decompose(*stack, 2, 0.0)[:2]
    monkeypatch.setattr(factors, "_decompose", None)
    for found, wanted in zip(truncate(*stack, 2), slow, strict=True):
        close(found, wanted, float(np.linalg.norm(slow[0], 2)))


@given(st.sampled_from([0, 1]), sizes, sizes, weight_lists, seeds)
def test_no_residual_where_clients_agree_on_a_factor(
    side: int, m: int, n: int, weights: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    clients = [list(draw_pair(rng, m, n, 2)) for _ in weights]
    for client in clients:
        client[side] = clients[0][side]
        client[1 - side] *= 10.0 ** rng.integers(-9, 9)
    B, A = residual([(b, a) for b, a in clients], weights)
    assert B.shape == (m, 0)
    assert A.shape == (0, n)
    assert refactorize(B, A)[0].shape == (m, 0)
    assert not np.matmul(*truncate(B, A, 2)).any()


def test_small_residuals_keep_their_digits() -> None:
    rng = np.random.default_rng(5)
    start, move = draw_pair(rng, 8, 7, 2), draw_pair(rng, 8, 7, 2)
    tiny = 2.0**-20
    clients = [(start[0] + s * tiny * move[0], start[1] + s * tiny * move[1]) for s in (1, -1)]
    wanted = tiny**2 * move[0] @ move[1]
    close(np.matmul(*residual(clients, [1, 1])), wanted, np.abs(wanted).max(), 1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_have_the_inputs_type_and_the_same_bits(dtype: DTypeLike) -> None:
    rng = np.random.default_rng(3)
    clients = [(b.astype(dtype), a.astype(dtype)) for b, a in (draw_pair(rng, 9, 8, 3),) * 2]
    clients[1] = (clients[1][0][::-1], clients[1][1])
    calls: list[Callable[[], tuple[NDArray[np.floating], ...]]] = [
        lambda: refactorize(*clients[0]),
        lambda: truncate(*clients[0], 2),
        lambda: compact(*clients[0]),
        lambda: add(clients),
        lambda: combine(clients, [1, 2]),
        lambda: residual(clients, [1, 2]),
        lambda: (spectrum(*clients[0]),),
    ]
    for call in calls:
        for first, again in zip(call(), call(), strict=True):
            assert first.dtype == dtype
            assert first.tobytes() == again.tobytes()


B, A = np.ones((4, 2)), np.ones((2, 3))
NAN = np.array([[np.nan, 1.0, 1.0]] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refactorize(B, A.T), "shapes of B and A"),
        (lambda: spectrum(B[0], A), "shapes of B and A"),
        (lambda: refactorize(B[:0], A), "shapes of B and A"),
        (lambda: refactorize(B, NAN), "entries of A"),
        (lambda: truncate(B * np.inf, A, 1), "entries of B"),
        (lambda: refactorize(B.astype(int), A), "type of B"),
        (lambda: truncate(B, A, 0), "rank = 0"),
        (lambda: truncated_mean([(B, A)], [1.0], 0), "rank = 0"),
        (lambda: truncated_mean([(B, A * np.nan)], [1.0], 1), "entries of A"),
        (lambda: refactorize(B * 1e160, A * 1e160), "product"),
        (lambda: refactorize(B * 1e160, A / 1e160), "product"),
        (lambda: refactorize(B.astype("f2") * 300, A.astype("f2") * 300), "result"),
        (lambda: compact(B, A.T), "shapes of B and A"),
        (lambda: compact(B, NAN), "entries of A"),
        (lambda: truncate(np.ones((40, 40)) * 1e160, np.ones((40, 40)), 1), "product"),
        (lambda: add([]), "weights"),
        (lambda: add([(B, A), (B, NAN)]), "entries of A"),
        (lambda: add([(B, A), (B[1:], A)]), "shapes of the products"),
        (lambda: combine([(B, A)], []), "weights"),
        (lambda: residual([(B, A)], [-1.0]), "weights"),
        (lambda: combine([(B, A)], [1, 1]), "one for each of 1 pairs"),
        (lambda: combine([(B, A)], [1], [1, 2]), "scalings"),
        (lambda: combine([(B, A)], [1], [np.nan]), "scalings"),
        (lambda: combine([(B, A), (B[1:], A)], [1, 1]), "shapes of the products"),
        (lambda: combine([(B, A), (B, NAN)], [1, 0]), "entries of A"),
        (lambda: residual([(B, A), (B[:, :1], A[:1])], [1, 1]), "ranks"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        call()
