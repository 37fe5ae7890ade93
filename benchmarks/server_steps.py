"""Every strategy's server step for one layer, and those of published code: seconds, equality.

A library of `benchmarks.aggregation`, without a command of its own.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from fedlora_flwr.algebra.factors import combine, compact, refactorize, residual, truncated_mean
from fedlora_flwr.algebra.means import weighted_mean
from fedlora_flwr.algebra.update_sums import UpdateSums

Factor: TypeAlias = NDArray[np.floating]
Pair: TypeAlias = tuple[Factor, Factor]
Call: TypeAlias = Callable[[], object]
Shape: TypeAlias = tuple[int, int]
Cell: TypeAlias = tuple[Shape, int, int]

MOVED = 0.1
"""Size of a client's change relative to the common start, entry by entry."""

AVERAGE_BOTH = "dp-lora, la-lora"
AVERAGE_ONE = "ffa-lora, rolora, as-lora"
FEDSVD, FLEXLORA, UNRELATED = "fedsvd", "flexlora", "flexlora, unrelated clients"
FLORA, FEDEX, FEDSA = "flora", "fedex-lora", "fedsa-lora"
ADDING, ENDING = "mean of B, streamed: as replies come", "mean of B, streamed: after the last"
MEAN_OF_PRODUCTS, PRODUCT_OF_MEAN = "SVD of the mean of products", "SVD of mean(B) A"


def draw(cell: Cell, related: bool, dtype: DTypeLike) -> list[Pair]:
    """Draw the clients' factors: a common start with a small change each, or unrelated ones."""
    (m, n), clients, r = cell
    rng = np.random.default_rng([m, n, clients, r])
    sides = ((m, r), (r, n))
    start = [rng.standard_normal(side) for side in sides]
    common, own = (1.0, MOVED) if related else (0.0, 1.0)
    return [
        (B.astype(dtype), A.astype(dtype))
        for B, A in (
            [common * at + own * rng.standard_normal(at.shape) for at in start]
            for _ in range(clients)
        )
    ]


def strategies(pairs: list[Pair], unrelated: list[Pair]) -> dict[str, Call]:
    """Give each strategy's server step for one layer, with the package's own functions."""
    weights = [1.0] * len(pairs)
    rank = pairs[0][1].shape[0]
    both = [{"A": A, "B": B} for B, A in pairs]
    only_a, only_b = [{"A": A} for _, A in pairs], [{"B": B} for B, _ in pairs]

    def fedsvd() -> Pair:
        return refactorize(weighted_mean(only_b, weights)["B"], pairs[0][1])

    def flexlora(clients: list[Pair]) -> Pair:
        return truncated_mean(clients, weights, rank)

    full = sums_of(only_b)
    return {
        AVERAGE_BOTH: lambda: weighted_mean(both, weights),
        AVERAGE_ONE: lambda: weighted_mean(only_b, weights),
        FEDSA: lambda: weighted_mean(only_a, weights),
        FEDSVD: fedsvd,
        FLEXLORA: partial(flexlora, pairs),
        UNRELATED: partial(flexlora, unrelated),
        FLORA: lambda: compact(*combine(pairs, weights)),
        FEDEX: lambda: (weighted_mean(both, weights), residual(pairs, weights)),
        ADDING: lambda: sums_of(only_b),
        ENDING: full.mean,
    }


def sums_of(uploads: list[dict[str, Factor]]) -> UpdateSums:
    """Add up uploads as a server does that keeps none, with what it says of their agreement."""
    start = {name: np.zeros_like(array) for name, array in uploads[0].items()}
    sums = UpdateSums(start, start)
    for upload in uploads:
        sums.add(upload)
    return sums


def svd_numpy(matrix: torch.Tensor, rank: int) -> Pair:
    """Cut the SVD by NumPy to a rank."""
    u, sigma, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return u[:, :rank] * sigma[:rank], vt[:rank]


def svd_torch(matrix: torch.Tensor, rank: int) -> Pair:
    """Cut the SVD by torch to a rank."""
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]).numpy(), vt[:rank].numpy()


LIBRARIES: dict[str, Callable[[torch.Tensor, int], Pair]] = {
    "numpy": svd_numpy,
    "torch": svd_torch,
}


def mean_of_products(pairs: list[Pair]) -> torch.Tensor:
    """Form ``Σ B_k A_k / N`` as one m x n matrix, in place and always in the factors' type."""
    total = torch.zeros(
        len(pairs[0][0]), pairs[0][1].shape[1], dtype=torch.from_numpy(pairs[0][0]).dtype
    )
    for B, A in pairs:
        total.addmm_(torch.from_numpy(B), torch.from_numpy(A), alpha=1 / len(pairs))
    return total


def full_ways(pairs: list[Pair], library: str) -> dict[str, Call]:
    """Give the two server steps of published code for one layer."""
    rank = pairs[0][1].shape[0]
    svd = LIBRARIES[library]

    def product_of_mean() -> Pair:
        mean = torch.zeros(pairs[0][0].shape)
        for B, _ in pairs:
            mean.add_(torch.from_numpy(B), alpha=1 / len(pairs))
        return svd(mean @ torch.from_numpy(pairs[0][1]), rank)

    return {
        MEAN_OF_PRODUCTS: lambda: svd(mean_of_products(pairs), rank),
        PRODUCT_OF_MEAN: product_of_mean,
    }


def clock(call: Call, at_least: float = 5e-3, at_most: int = 10) -> list[float]:
    """Time a call, a fast one up to ten times, in seconds of this thread's CPU."""
    seconds: list[float] = []
    while not seconds or (sum(seconds) < at_least and len(seconds) < at_most):
        begin = time.thread_time()
        call()
        seconds.append(time.thread_time() - begin)
    return seconds


def peaks(cell: Cell) -> dict[str, int]:
    """Return the most bytes that each server step for one layer takes beside the uploads."""
    found: dict[str, int] = {}
    for name, call in strategies(
        draw(cell, True, np.float32), draw(cell, False, np.float32)
    ).items():
        tracemalloc.start()
        call()
        found[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


def time_cell(cell: Cell, library: str, repetitions: int) -> dict[str, float]:
    """Take the median seconds of everything for one layer; methods take turns."""
    pairs, unrelated = draw(cell, True, np.float32), draw(cell, False, np.float32)
    calls = strategies(pairs, unrelated) | full_ways(pairs, library)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            seconds[name] += clock(call)
    return {name: statistics.median(found) for name, found in seconds.items()}


def time_libraries(shape: Shape) -> dict[str, float]:
    """Time one fp32 SVD by each library, after one to warm up."""
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    seconds = {}
    for name, svd in LIBRARIES.items():
        svd(matrix[:32, :32], 1)
        seconds[name] = statistics.median(clock(partial(svd, matrix, 1), 0.2, 3))
    return seconds


def compare(cell: Cell, related: bool) -> dict[str, object]:
    """Compare the products in fp64 with those of the full SVD, relative to the largest σ."""
    pairs = draw(cell, related, np.float64)
    weights, (shape, clients, rank) = [1.0] * len(pairs), cell
    dense = mean_of_products(pairs)
    sigma = float(torch.linalg.svdvals(dense)[0])
    stack = combine(pairs, weights)
    mean = weighted_mean([{"B": B, "A": A} for B, A in pairs], weights)
    single = mean["B"] @ pairs[0][1]
    extra = residual(pairs, weights)

    def off(found: Factor, wanted: Factor, scale: float) -> float:
        return float(np.abs(found - wanted).max() / scale)

    return {
        "shape": list(shape),
        "clients": clients,
        "rank": rank,
        "uploads": "one start and small changes" if related else "unrelated",
        FEDSVD: off(
            np.matmul(*refactorize(mean["B"], pairs[0][1])),
            np.matmul(*svd_numpy(torch.from_numpy(single), rank)),
            float(np.linalg.norm(single, 2)),
        ),
        FLEXLORA: off(
            np.matmul(*truncated_mean(pairs, weights, rank)),
            np.matmul(*svd_numpy(dense, rank)),
            sigma,
        ),
        FLORA: off(np.matmul(*compact(*stack)), dense.numpy(), sigma),
        FEDEX: off(mean["B"] @ mean["A"] + np.matmul(*extra), dense.numpy(), sigma),
    }
