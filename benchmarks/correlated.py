"""Calculates whether correlated noise (banded matrix factorization, BandMF) would help.

With b bands, part of a round's noise is subtracted again in the next b - 1 rounds. A record may
then join only every b-th round, so the records form b groups, and rounds draw from one group with b
times the rate (arXiv 2306.08153). The noise multiplier is that of T/b steps at the rate bq, times
the strategy matrix's largest column norm. After plain steps, weights are the sum of all gradients
so far, so the noise in this sum counts. Figures are its root mean square over rounds and
coordinates, divided by that of independent noise at the same ε, δ, q and T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular, toeplitz  # type: ignore[import-untyped]

from benchmarks.figures import Figure
from fedlora_flwr.privacy.budget import calibrate

FEWEST_PER_BAND = 4


@dataclass(frozen=True)
class Setting:
    """One task's rounds: T, q and δ."""

    name: str
    rounds: int
    sample_rate: float
    delta: float


SETTINGS = (Setting("digits", 100, 0.14, 5e-4), Setting("SST-2", 56, 0.0304, 1e-5))
EPSILONS = (0.5, 1.0, 3.0, 8.0)


def measure(on_figure: Callable[[Figure], None]) -> None:
    """Compare the best number of bands with one, for each task and ε."""
    for setting in SETTINGS:
        for epsilon in EPSILONS:
            found = {
                bands: accumulated_noise(setting, epsilon, bands) for bands in choices(setting)
            }
            best = min(found, key=lambda bands: found[bands])
            what = f"{setting.name}, ε = {epsilon:g}: noise in the sum of gradients, {best} bands"
            on_figure(Figure(what, found[best], found[1], "C", "independent noise"))


def choices(setting: Setting) -> list[int]:
    """Return the numbers of bands to try, with which the rate stays at most 1."""
    most = min(setting.rounds // FEWEST_PER_BAND, int(1 / setting.sample_rate))
    return sorted({1, *(round(most ** (i / 8)) for i in range(9))})


def accumulated_noise(setting: Setting, epsilon: float, bands: int) -> float:
    """Return the noise in the sum of all gradients so far, root mean square over the rounds."""
    steps = math.ceil(setting.rounds / bands)
    sigma = calibrate(epsilon, setting.delta, bands * setting.sample_rate, steps)
    strategy = banded_root(setting.rounds, bands)
    sums = np.tril(np.ones((setting.rounds, setting.rounds)))
    # The error of `sums` with noise through the inverse of the strategy matrix.
    factor = solve_triangular(strategy.T, sums.T, lower=False).T
    return sigma * float(np.sqrt((factor**2).sum() / setting.rounds))


def banded_root(rounds: int, bands: int) -> NDArray[np.float64]:
    """Return the first bands of the prefix sum's square root, with all column norms at most 1."""
    root = np.zeros(rounds)
    root[0] = 1.0
    for i in range(1, bands):
        root[i] = root[i - 1] * (2 * i - 1) / (2 * i)
    matrix = np.tril(toeplitz(root))
    return np.asarray(matrix / np.linalg.norm(matrix, axis=0).max())
