"""AS-LoRA's scores: estimates, with errors, of how much a round's updates lowered the loss.

Everything here reads uploads only. The noise of two clients is independent, and so is the noise of
two rounds. The product of two such updates is therefore free of noise on average, and no noise has
to be known or subtracted. The derivation is in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.update_sums import UpdateSums

_LEAST = 1e-6  # Least weight of all pairs of clients; below it, one client has all the weight.


@dataclass(frozen=True)
class Estimate:
    """An estimate and the variance of its error; sums treat estimates as independent."""

    value: float = 0.0
    variance: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, self.variance + other.variance)

    def __sub__(self, other: Estimate) -> Estimate:
        return self + -1.0 * other

    def __rmul__(self, scale: float) -> Estimate:
        return Estimate(scale * self.value, scale * scale * self.variance)


@dataclass(frozen=True, eq=False)
class Movement:
    """The mean of one array's updates in one round, and how much of it is noise.

    Parameters
    ----------
    mean : ndarray
        Weighted mean of the updates, fp32, in the array's shape.
    square : Estimate or None
        Squared norm that the mean would have without noise. None for a single update, whose noise
        cannot be told from its signal.
    noise : float
        Squared norm of the mean's noise, ``Σ wᵢ²‖Δᵢ‖²``. It includes 1/N of the signal that the
        updates share, so it is a little too large rather than too small.
    """

    mean: NDArray[np.float32]
    square: Estimate | None
    noise: float

    @classmethod
    def of(
        cls, mean: NDArray[np.float32], square: Mapping[str, float] | None, noise: float
    ) -> Movement:
        """Rebuild a movement from the output of ``dataclasses.asdict``."""
        return cls(np.array(mean), None if square is None else Estimate(**square), noise)

    def times(self, factor: float) -> Movement:
        """Return the movement multiplied by a number."""
        square = None if self.square is None else factor**2 * self.square
        return Movement(self.mean * np.float32(factor), square, factor**2 * self.noise)


def movements(sums: UpdateSums, names: Iterable[str]) -> dict[str, Movement]:
    """Return the movement of each named array.

    ``‖Σ wᵢΔᵢ‖² - Σ wᵢ²‖Δᵢ‖²`` is the sum of the products between different clients, whose weights
    sum to ``1 - Σ wᵢ²``. Its variance under noise of d independent coordinates is
    ``2/d·((Σeᵢ)² - Σeᵢ²) + 4/d·Σeᵢ·‖mean‖²`` with ``eᵢ = wᵢ²‖Δᵢ‖²``.

    Uploads that are all the same to the last bit count as one upload, since independent noise
    always differs. Such uploads come from secure aggregation, which gives each client's as the
    mean.

    Parameters
    ----------
    sums : UpdateSums
        The round's updates, at least one.
    names : Iterable[str]
        Arrays to look at.
    """
    updates, energies = sums.updates(), sums.energies()
    weight, squares = sums.weights
    others, found = 1 - squares / weight**2, {}
    for name in names:
        mean, (noise, fourth), square = updates[name], energies[name], None
        power, size = float(np.vdot(mean, mean)), max(mean.size, 1)
        if sums.same:
            noise = power
        elif others > _LEAST:
            value = power - noise
            crossed = max(noise * noise - fourth, 0.0)
            variance = (2 * crossed + 4 * noise * max(value, 0.0)) / size
            square = (1 / others) * Estimate(value, variance)
        found[name] = Movement(mean.astype(np.float32), square, noise)
    return found


def across(before: Movement, after: Movement) -> Estimate:
    """Return the product of an array's mean updates in two rounds, without their noise."""
    value = float(np.vdot(before.mean.astype(np.float64), after.mean.astype(np.float64)))
    # The noise of a single update includes its signal, so no energy is added for it.
    energies = [0.0 if m.square is None else max(m.square.value, 0.0) for m in (before, after)]
    crossed = before.noise * after.noise
    crossed += before.noise * energies[1] + after.noise * energies[0]
    return Estimate(value, crossed / max(before.mean.size, 1))


def secant(before: Movement, after: Movement, steps: int) -> Estimate:
    """Return how much curvature reduces ``before.square``, as the round right after it shows.

    ``U - L`` is the secant: how much less steeply the loss falls along the first round's update at
    its end than on its way, times the rate. L is `across`, so the end is where the *noisy* update
    led, and half of the difference is the cost of noise. The rest of the formula removes what the
    mean gradient of the K steps already contains.

    Parameters
    ----------
    before, after : Movement
        Movements of one array in two consecutive rounds, each of several clients.
    steps : int
        Local steps K per round; 0 stands for many.
    """
    assert before.square is not None
    assert after.square is not None
    quarter = (1 - 1 / steps if steps else 1.0) / 4
    ends = (0.5 - quarter) * before.square + quarter * after.square
    return ends - 0.5 * across(before, after)


@dataclass
class Average:
    """A discounted mean of estimates that do not arrive in every round.

    The k-th last estimate has the weight ``decay**k``. In each round without a new estimate, the
    variance of the mean grows by the factor ``1/decay``.
    """

    weight: float = 0.0
    total: float = 0.0
    spread: float = 0.0
    last: int = 0

    def add(self, found: Estimate, server_round: int, decay: float) -> None:
        """Take in a round's estimate."""
        self.weight = decay * self.weight + 1
        self.total = decay * self.total + found.value
        self.spread = decay * decay * self.spread + found.variance
        self.last = server_round

    @property
    def mean(self) -> float | None:
        """The mean; None before the first estimate."""
        return self.total / self.weight if self.weight else None

    def age(self, server_round: int) -> int:
        """Return how many rounds before this one passed without a new estimate."""
        return max(server_round - 1 - self.last, 0)

    def at(self, server_round: int, decay: float) -> Estimate | None:
        """Return the mean and its aged variance before a round; None before the first estimate."""
        if self.mean is None:
            return None
        known = decay ** self.age(server_round)
        variance = self.spread / self.weight**2
        return Estimate(self.mean, variance / known if known > 1e-300 else math.inf)
