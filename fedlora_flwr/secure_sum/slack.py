r"""How far a sum of discrete Gaussians is from the continuous Gaussian of the accountants.

Two steps lead from the continuous Gaussian to what clients add, and each changes every probability
by at most a factor of :math:`e^{\pm\lambda}`. Write ρ_v(x) for
:math:`\exp(-x^2/2v)`. By Poisson's summation formula its sum over the whole numbers, moved by any
u, is :math:`\sqrt{2\pi v}\,(1 \pm \eta_v)`, with :math:`\eta_v = 2\sum_{j\ge1} e^{-2\pi^2 v j^2}`.

*A sum of shares is nearly one discrete Gaussian.* Let X and Y be discrete Gaussians of variances a
and b. Completing the square, P[X + Y = z] is ρ_{a+b}(z) times the sum of ρ_c over moved whole
numbers, with c = ab/(a+b), over the two normalizing sums. So its ratio to the discrete Gaussian of
variance a + b is within :math:`(1 - \eta_c)^{\pm3}`. Adding share k + 1 to k shares of variance s²
has c = s²k/(k+1) (arXiv 2102.06387, section 3, with a slightly better constant).

*One discrete Gaussian is nearly a continuous one, post-processed.* Add N(0, v - w) to a whole
number, and round the result x to the whole number y with probability proportional to ρ_w(y - x).
The same integral gives y, up to :math:`(1 - \eta_w)^{\pm2}`, the discrete Gaussian of variance v
around the number. The rounding reads only x, so it is post-processing (the idea is that of Peikert,
CRYPTO 2010, theorem 3.1). So a bound of the accountants for a Gaussian of variance v - w, for any
sampling of records and any number of steps, holds for the discrete one, up to the factor.

Over all coordinates and steps the factors multiply. With λ for the sum of their logarithms, an
(ε, δ) of the continuous mechanism is an (ε + 2λ, e^λ δ) of ours.
"""

from __future__ import annotations

import math

__all__ = ["ROUNDING", "log_ratio", "widened"]

ROUNDING = 6.0
"""w: variance, in squared units of the grid, that the second step gives up. It makes η < 1e-51."""


def log_ratio(deviation: int, shares: int) -> float:
    """Bound λ for one coordinate of one step: the logarithm of the product of both factors.

    Parameters
    ----------
    deviation : int
        s: standard deviation of one share, in units of the grid.
    shares : int
        m: number of shares in the sum, at least 1.

    Returns
    -------
    float
        λ, at least 0. Infinite where m·s² is not above `ROUNDING`.

    References
    ----------
    This module's text; arXiv 2102.06387, section 3; arXiv 2004.00010, fact 18.

    Examples
    --------
    >>> log_ratio(100, 10) < 1e-50
    True
    >>> round(log_ratio(1, 10), 6)
    0.000326
    """
    if shares * deviation**2 <= ROUNDING:
        return math.inf
    total = -2 * math.log1p(-_eta(ROUNDING))
    # The first terms make up nearly all of the sum. Each later one is at most the last of them.
    exact = min(shares - 1, 1000)
    parts = [-3 * math.log1p(-_eta(deviation**2 * k / (k + 1))) for k in range(1, exact + 1)]
    rest = (shares - 1 - exact) * parts[-1] if parts else 0.0
    return total + math.fsum(parts) + rest


def widened(epsilon: float, delta: float, total: float) -> tuple[float, float]:
    """Return the (ε, δ) of the integer mechanism, given that of the continuous one.

    Parameters
    ----------
    epsilon, delta : float
        An accountant's bound for a Gaussian of variance m·s² - `ROUNDING`.
    total : float
        λ of all coordinates and steps together, at least 0.

    Returns
    -------
    tuple[float, float]
        ε + 2λ and e^λ δ.

    References
    ----------
    This module's text.
    """
    return epsilon + 2 * total, delta * math.exp(min(total, 700.0))


def _eta(variance: float) -> float:
    """Bound η_v from above by its series with j in place of j² in the exponents."""
    first = math.exp(-2 * math.pi**2 * variance)
    return 2 * first / (1 - first)
