r"""The integer grid of a secure sum: clipped gradients, shares of noise, and the sum modulo 2³².

A grid of mesh γ turns the clip norm C into Δ = C/γ, a whole number. Each record's clipped gradient
is rounded to whole numbers whose norm is at most Δ, so that one record moves a client's integer sum
by at most Δ for any rounding. (Rounding the *sum* instead would let one record move every
coordinate by one more: Δ + √D.) A client adds its share of noise in whole numbers and uploads the
result modulo 2³². Only the sum over all clients is opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.secure_sum.discrete_gaussian import (
    LARGEST_DEVIATION,
    Words,
    discrete_gaussian,
    system_words,
)
from fedlora_flwr.secure_sum.slack import ROUNDING, log_ratio
from fedlora_flwr.wire.limits import Residues

__all__ = ["MOST_SLACK", "Grid", "fitting_norm", "opened", "residues"]

MODULUS_BITS = 32
LARGEST_NORM = 1 << 20
"""Largest Δ: fp32 holds whole numbers of up to 24 bits exactly."""
SMALLEST_NORM = 1 << 10
"""Smallest Δ that `fitting_norm` chooses."""
WRAPS = 2.0**-40
"""Largest probability per round that a sum leaves the range of 32 bits."""
MOST_SLACK = 1e-15
"""Largest λ of a whole run: added to ε, it changes no digit that is shown or compared."""


@dataclass(frozen=True)
class Grid:
    """One round's grid, and the size of a client's share of the noise on it.

    Parameters
    ----------
    norm : int
        Δ: largest norm of one record's rounded gradient, in units of the grid.
    deviation : int
        s: standard deviation of one client's share of the noise, in units of the grid.
    shares : int
        m: honest shares that every opened sum holds: the clients asked, less the dropouts that are
        tolerated, less the clients that may tell the server their noise.

    Raises
    ------
    InvalidValue
        A number is out of range, or the noise is too small for the grid.

    Guarantees
    ----------
    *What holds.* Take a sum of at least ``shares`` uploads, each with its own `noise` added to a
    sum of gradients that `rounded` made. For one record whose gradient is replaced by zero, it is
    as private as a Gaussian of ``noise_multiplier``, up to `slack`.
    *Under which assumptions.* The server sees nothing but the sum, and at least ``shares`` of the
    uploads in it have noise that the server does not know.
    *What does not hold.* One upload alone has the noise of one share only: see
    ``single_noise_multiplier``.

    References
    ----------
    arXiv 2102.06387, algorithms 1 and 2, with rounded records in place of rounded clients.
    """

    norm: int
    deviation: int
    shares: int

    def __post_init__(self) -> None:
        for key, value, most in (
            ("grid norm", self.norm, LARGEST_NORM),
            ("noise deviation", self.deviation, LARGEST_DEVIATION),
            ("shares", self.shares, 1 << 20),
        ):
            if not 1 <= value <= most:
                raise InvalidValue(key, value, f"a whole number from 1 to {most:,}")
        if math.isinf(log_ratio(self.deviation, self.shares)):
            allowed = f"a number whose square, times {self.shares} shares, is above {ROUNDING:g}"
            raise InvalidValue("noise deviation", self.deviation, allowed)

    @classmethod
    def of(cls, noise_multiplier: float, shares: int, norm: int) -> Grid:
        """Make the grid on which the sum has at least a given noise multiplier.

        Parameters
        ----------
        noise_multiplier : float
            σ that the accountant asks for. The sum's variance is at least σ²Δ².
        shares : int
            m.
        norm : int
            Δ.

        Raises
        ------
        InvalidValue
            No grid exists: σ is too large for 32 bits, or too small for this Δ.
        """
        wanted = math.sqrt(((noise_multiplier * norm) ** 2 + ROUNDING) / shares)
        grid = cls(norm, math.ceil(wanted), shares)
        if grid.noise_multiplier < noise_multiplier:  # The root was rounded down.
            grid = cls(norm, grid.deviation + 1, shares)
        return grid

    @property
    def noise_multiplier(self) -> float:
        """σ of the continuous Gaussian with which the accountant models the whole sum's noise."""
        return math.sqrt(self.shares * self.deviation**2 - ROUNDING) / self.norm

    @property
    def single_noise_multiplier(self) -> float:
        """σ/√m: the noise of one upload, its only protection if the masks fail."""
        return math.sqrt(max(0.0, self.deviation**2 - ROUNDING)) / self.norm

    def slack(self, coordinates: int, steps: int) -> float:
        """Return λ of a whole run (see `fedlora_flwr.secure_sum.slack`).

        Parameters
        ----------
        coordinates : int
            D: largest number of coordinates that train at once.
        steps : int
            T: number of rounds.
        """
        return log_ratio(self.deviation, self.shares) * coordinates * steps

    def check_slack(self, coordinates: int, steps: int) -> None:
        """Refuse a grid on which the sum of shares is too far from a Gaussian.

        Raises
        ------
        InvalidValue
            λ is above `MOST_SLACK`.
        """
        if not self.slack(coordinates, steps) <= MOST_SLACK:
            allowed = (
                f"more: {coordinates:,} coordinates over {steps:,} rounds need a finer grid or "
                "more noise"
            )
            raise InvalidValue("noise deviation", self.deviation, allowed)

    def noise(self, count: int, words: Words = system_words) -> NDArray[np.int64]:
        """Draw one client's share of the noise, int64 of shape (count,)."""
        return discrete_gaussian(self.deviation, count, words)


def fitting_norm(
    noise_multiplier: float, shares: int, clients: int, batch: float, coordinates: int
) -> int:
    r"""Choose Δ = C/γ: the largest power of two with which a sum practically never wraps.

    A wrap costs accuracy but no privacy. A coordinate of the sum is at most RΔ plus the noise,
    where R is the number of records that joined. By Bernstein's inequality R passes
    :math:`b + l/3 + \sqrt{l^2/9 + 2bl}` with probability e⁻ˡ at most, for an expected number b; the
    noise of all N shares passes :math:`\sigma\Delta\sqrt{2(N/m)\,(l + \log 2D)}` in any of D
    coordinates with probability e⁻ˡ at most (arXiv 2004.00010, proposition 25: a discrete Gaussian
    is subgaussian). With e⁻ˡ at half of `WRAPS`, the two probabilities add up to at most `WRAPS`.

    Parameters
    ----------
    noise_multiplier : float
        σ of the sum of m shares.
    shares : int
        m.
    clients : int
        N: shares that may be in a sum, at least m.
    batch : float
        b: expected number of records in a round, over all clients.
    coordinates : int
        D: number of coordinates that train at once.

    Returns
    -------
    int
        Δ, at most 1,048,576, and large enough that rounding takes at most 1/16 of the clip norm.

    Raises
    ------
    InvalidValue
        The records, or the noise, do not fit into 32 bits.

    Examples
    --------
    >>> fitting_norm(3.0, shares=8, clients=10, batch=201, coordinates=20_000)
    1048576
    """
    tail = math.log(2 / WRAPS)
    records = batch + tail / 3 + math.sqrt(tail**2 / 9 + 2 * batch * tail)
    spread = math.sqrt(2 * clients / shares * (tail + math.log(2 * coordinates)))
    # The deviation is rounded up to a whole number: 1 % covers that for every Δ >= `SMALLEST_NORM`.
    most = (2 ** (MODULUS_BITS - 1) - 1) / (records + 1.01 * noise_multiplier * spread)
    deviation = LARGEST_DEVIATION * math.sqrt(shares) / (1.01 * noise_multiplier)
    exponent = math.floor(math.log2(min(most, deviation, LARGEST_NORM)))
    least = max(SMALLEST_NORM, 8 * math.sqrt(coordinates))
    if 2.0**exponent < least:
        allowed = (
            f"fewer: a sum of 32 bits holds {2**31 / least:,.0f} clipped gradients of "
            f"{coordinates:,} coordinates at most, and fewer with much noise (σ = "
            f"{noise_multiplier:.3g})"
        )
        raise InvalidValue("expected records per round", round(batch), allowed)
    return 1 << exponent


def residues(values: NDArray[np.int64]) -> Residues:
    """Return whole numbers modulo 2³², as uint32 of the same shape."""
    return values.astype(np.uint64).astype(np.uint32)


def opened(total: Residues) -> NDArray[np.int64]:
    """Return a sum as whole numbers from -2³¹ to 2³¹ - 1; they are exact unless the sum wrapped."""
    return total.view(np.int32).astype(np.int64)
