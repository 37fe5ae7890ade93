"""A budget over all of a client's runs, where each run's settings may depend on earlier results.

The composed PRV of a history is a bound only if the settings were fixed before the first release. A
server that reads run 1 and then chooses (σ, q, steps) of run 2 can keep the composed ε below a
bound in every outcome, while the true ε exceeds it. A budget for that case needs a privacy filter.

The filter here keeps one Rényi order α for each client. α follows from public figures alone: the
budget (ε, δ) and the (σ, q) of the client's first run, which is planned before any release. It is
stored in the ledger and never changes. A run is admitted only while

    Σ steps · ρ_α(σ, q)  ≤  B_α(ε, δ)

where the sum is over all steps taken, all steps that other runs have reserved, and the run's own
plan. ρ_α is the Rényi divergence of one Poisson-subsampled Gaussian step. B_α is the divergence
that the conversion turns into ε at δ.

Why this is valid (arXiv 2008.11193, theorem 4.3; 2103.01379; 2203.05481). Let L_t be the privacy
loss of all releases up to step t: of their distribution P with the record against their
distribution Q with the record's gradients replaced by zero. The settings of step t are a function
of earlier releases, so exp((α-1)·(L_t - Σ_{s≤t} ρ_s)) is a supermartingale that starts at 1. The
sum of the ρ never exceeds B_α on any path, hence E_P[exp((α-1)·L)] ≤ exp((α-1)·B_α): the whole
transcript is (α, B_α)-RDP, and therefore (ε, δ)-DP. The same holds with P and Q exchanged, because
ρ_α bounds both directions (arXiv 1908.10530, theorem 5). The order must be chosen in advance,
because the order that turns out to be best depends on releases.

Why not another filter. Gaussian-DP filters (arXiv 2210.17520, 2209.15596) are exact for q = 1. For
q < 1, a step's loss has the same tail as without sampling, so the smallest valid μ is 1/σ and
sampling gains nothing. A filter with m orders, each at δ/m, needs 1 to 4 % more noise per run than
one order that fits the first run. The order that is best for plain Gaussian noise follows from
(ε, δ) alone, but at small q it needs up to 40 % more noise than the fitted one.

Where all runs of a client have settings that the first run's plan bounds, no filter is needed: see
`fedlora_flwr.privacy.account`.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.accountants import ROUNDING, Segment, step_divergence
from fedlora_flwr.privacy.budget import calibrate

__all__ = ["allowance", "calibrate_run", "choose_order", "filtered_epsilon", "run_divergence"]

_ORDERS = (
    *(1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75),
    *(x / 2 for x in range(6, 21)),
    *map(float, range(11, 64)),
    *(80.0, 96.0, 128.0, 160.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0),
)
_MAX_NOISE = 1e5
_TOLERANCE = 1e-3


def allowance(epsilon: float, delta: float, order: float) -> float:
    """Return B_α: the largest Rényi divergence of order α that still gives (ε, δ)-DP.

    Parameters
    ----------
    epsilon, delta : float
        The budget.
    order : float
        α, above 1.

    Returns
    -------
    float
        B_α; below 0 where the order can't show the budget at all.

    References
    ----------
    arXiv 1905.09982, theorem 21.
    """
    return epsilon - filtered_epsilon(0.0, delta, order, floor=-math.inf)


def filtered_epsilon(divergence: float, delta: float, order: float, *, floor: float = 0.0) -> float:
    """Return the ε that a Rényi divergence of order α gives at δ; at least ``floor``."""
    gain = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(floor, divergence + gain)


def run_divergence(segment: Segment, order: float) -> float:
    """Return the Rényi divergence of order α of a segment's steps; infinite without noise."""
    if not segment.steps:
        return 0.0
    return segment.steps * step_divergence(segment.noise_multiplier, segment.sample_rate, order)


def choose_order(epsilon: float, delta: float, first: Segment) -> float:
    """Choose the order that admits the most steps of a client's first mechanism.

    Parameters
    ----------
    epsilon, delta : float
        The budget; ε is finite.
    first : Segment
        σ and q that the first run planned, before any release. Its number of steps doesn't matter.

    Raises
    ------
    InvalidValue
        No order can show a budget this small.
    """
    return _choose_order(epsilon, delta, first.noise_multiplier, first.sample_rate)


@functools.lru_cache(maxsize=256)
def _choose_order(epsilon: float, delta: float, sigma: float, rate: float) -> float:
    useful = [order for order in _ORDERS if allowance(epsilon, delta, order) > 0]
    if not useful:
        what = f"a budget that a filter of order up to {_ORDERS[-1]:g} can meet"
        raise InvalidValue("epsilon", epsilon, what)
    allowed = np.array([allowance(epsilon, delta, order) for order in useful])
    # Without noise no order admits any step, so any of the useful orders can be taken.
    most, chosen = 0.0, 0
    # Divergences grow with the order, so the divergence at one order is a lower bound for all
    # larger ones. This rules out most orders, whose series then need not be summed.
    open_ranges = [(0, len(useful), 0.0)]
    while open_ranges:
        first, end, floor = open_ranges.pop()
        open_orders = first + np.flatnonzero(allowed[first:end] >= most * (floor - 2 * ROUNDING))
        if open_orders.size:
            first, middle = int(open_orders[0]), int(open_orders[open_orders.size // 2])
            found = step_divergence(sigma, rate, useful[middle])
            steps = float(allowed[middle]) / found
            if steps > most or (steps == most and middle < chosen):
                most, chosen = steps, middle
            open_ranges.append((first, middle, floor))
            known = found if math.isfinite(found) else floor
            open_ranges.append((middle + 1, int(open_orders[-1]) + 1, known))
    return useful[chosen]


def calibrate_run(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    *,
    run_epsilon: float,
    order: float | None = None,
) -> float:
    """Find the noise for one run of a client whose budget covers all its runs.

    Parameters
    ----------
    epsilon, delta : float
        The budget of all runs. An infinite ε gives 0: no noise.
    sample_rate : float
        q, above 0 and at most 1.
    steps : int
        Steps that the run plans, at least 1.
    run_epsilon : float
        The ε that this run alone may spend, by PRV. Above 0 and at most ``epsilon``.
    order : float, optional
        The order of the client's filter, if an earlier run has fixed it. By default the order that
        this run would fix.

    Returns
    -------
    float
        σ. A run with it spends at most ``run_epsilon`` alone, and an unused filter admits it.

    Raises
    ------
    InvalidValue
        An argument is out of range, or no noise is enough.
    """
    if not 0 < run_epsilon <= epsilon:
        allowed = f"a number above 0 and at most epsilon = {epsilon:g}"
        raise InvalidValue("run-epsilon", run_epsilon, allowed)
    sigma = calibrate(run_epsilon, delta, sample_rate, steps)
    if math.isinf(epsilon) or _admits(epsilon, delta, Segment(sigma, sample_rate, steps), order):
        return sigma
    low, high = sigma, _MAX_NOISE
    if not _admits(epsilon, delta, Segment(high, sample_rate, steps), order):
        raise InvalidValue("epsilon", epsilon, f"a budget that a σ up to {_MAX_NOISE:g} can meet")
    while high > (1 + _TOLERANCE) * low:
        middle = math.sqrt(low * high)
        if _admits(epsilon, delta, Segment(middle, sample_rate, steps), order):
            high = middle
        else:
            low = middle
    return high


def _admits(epsilon: float, delta: float, planned: Segment, order: float | None) -> bool:
    order = order or choose_order(epsilon, delta, planned)
    return run_divergence(planned, order) <= allowance(epsilon, delta, order)
