"""The privacy loss of one Poisson-subsampled Gaussian step, in either direction, on a grid.

M and N are as in `fedlora_flwr.privacy.accountants`: a step's output with the record and with the
record zeroed.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr  # type: ignore[import-untyped]

__all__ = ["Direction", "mean_loss", "opacus_analysis", "step_loss"]

Direction = Literal["add", "remove"]


@functools.lru_cache(maxsize=16)
def step_loss(sigma: float, rate: float, points: int, mesh: float, direction: Direction) -> Any:
    """Return the distribution of one step's privacy loss on a grid, as Opacus' ``DiscretePRV``.

    Raises
    ------
    RuntimeError
        The grid is too small or too coarse for the loss.
    """
    prv, _ = opacus_analysis()
    # Opacus' composition needs the loss 0 at this index.
    zero = points // 2 - 1
    domain = prv.Domain(-zero * mesh, (points - 1 - zero) * mesh, points)
    loss = _AdditionPRV if direction == "add" else prv.PoissonSubsampledGaussianPRV
    edges = domain.t_min + (np.arange(points + 1) - 0.5) * mesh
    with np.errstate(divide="ignore", over="ignore"):  # q = 1 takes the logarithm of 0.
        below = np.asarray(loss(rate, sigma).cdf(edges.clip(domain.t_min, domain.t_max)))
    mass = np.diff(below) / (below[-1] - below[0])
    # Remark 5.6 of arXiv 2106.02848: the grid is shifted so that its mean is the mean of the loss.
    # Without the shift the error would grow with the number of steps.
    shift = mean_loss(sigma, rate, direction) - float(domain.ts @ mass)
    if abs(shift) >= mesh / 2:
        raise RuntimeError("The grid does not hold the privacy loss.")
    return prv.DiscretePRV(pmf=mass, domain=domain.shift_right(shift))


def mean_loss(sigma: float, rate: float, direction: Direction) -> float:
    """Return the mean of one step's privacy loss: a Kullback-Leibler divergence of M and N.

    The trapezoidal rule is exact here up to rounding, because its step is small against σ and
    against πσ², the distance of the logarithm's branch points from the real line. Callers need no σ
    below about 0.04, because no grid holds the loss there; the rule would need many points.
    """
    step = min(sigma / 4, sigma**2 / 2)
    x = np.arange(-10 * sigma, 1 + 10 * sigma, step)
    with np.errstate(divide="ignore"):  # q = 1 takes the logarithm of 0.
        loss = np.logaddexp(np.log1p(-rate), np.log(rate) + (x - 0.5) / sigma**2)
    without = np.exp(-((x / sigma) ** 2) / 2) * step / (sigma * math.sqrt(2 * math.pi))
    if direction == "add":
        return -float(without @ loss)
    with_it = np.exp(-(((x - 1) / sigma) ** 2) / 2) * step / (sigma * math.sqrt(2 * math.pi))
    return float(((1 - rate) * without + rate * with_it) @ loss)


class _AdditionPRV:
    """Privacy loss log(N/M) under N: the direction that Opacus leaves out.

    Here N = normal(0, σ²), M = (1-q)·N + q·normal(1, σ²), and the loss at x is
    -log(1 - q + q·exp((2x-1)/(2σ²))), which falls in x and never exceeds -log(1-q).
    """

    def __init__(self, rate: float, sigma: float) -> None:
        self.rate = rate
        self.sigma = sigma

    def cdf(self, t: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the probability of a loss of at most ``t``."""
        ratio = (np.exp(-np.asarray(t, dtype=float)) - (1 - self.rate)) / self.rate
        log_ratio = np.log(np.where(ratio > 0, ratio, 1.0))
        threshold = self.sigma**2 * log_ratio + 0.5
        return np.where(ratio > 0, ndtr(-threshold / self.sigma), 1.0)


@functools.lru_cache(maxsize=1)
def opacus_analysis() -> tuple[Any, Any]:
    """Import the PRV and RDP modules of Opacus, without the log handler that it installs."""
    root = logging.getLogger()
    before = list(root.handlers)
    from opacus.accountants.analysis import prv, rdp

    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
    return prv, rdp
