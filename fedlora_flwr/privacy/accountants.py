"""Privacy-loss accountants for segments of Poisson-subsampled Gaussian steps.

Adjacency is zero-out: two data sets differ in one record, whose gradient is replaced by zero at
every step. The number of records n, the batch size b and the rate q = b/n are public and the same
for both. With the record, a step's output is the mixture M = (1-q)·normal(0, σ²) + q·normal(1, σ²)
along the record's clipped gradient; with the record zeroed it is N = normal(0, σ²). Either data set
may be the true one, so ε has to cover M against N and N against M. The literature calls these two
cases removal and addition of a record, and its accountants apply here without a change. To really
add or remove a record would change n, which is public here.

Every function here returns an upper bound on ε over both directions. Nothing is cached on disk and
nothing is checked against a budget: see `fedlora_flwr.privacy.budget`.

Opacus and dp-accounting are imported on first use, because importing Opacus takes seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import next_fast_len  # type: ignore[import-untyped]

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.loss_grid import Direction, opacus_analysis, step_loss

__all__ = [
    "ACCOUNTANTS",
    "MAX_STEPS",
    "ROUNDING",
    "Segment",
    "merge",
    "pld_epsilon",
    "prv_epsilon",
    "rdp_epsilon",
    "step_divergence",
]

# The orders of Opacus, and larger ones: without these no small ε can be shown.
_LARGE_ORDERS = (128.0, 256.0, 512.0)
_FINE_ORDERS = tuple(1 + x / 10 for x in range(1, 100)) + tuple(map(float, range(12, 64)))
# Fractional orders cost far more time than whole ones. A few are enough for a rough bound.
_COARSE_ORDERS = tuple(
    sorted((1.25, 1.5, 1.75, 2.25, 2.5, 3.5, *map(float, range(2, 64)), *_LARGE_ORDERS))
)

# Two million points take about 300 MB and one second. For a loss above 300, exp() comes near the
# end of its range. For δ below 1e-10, the rounding of the FFT is no longer small against δ.
_MAX_POINTS = 2**21
_MAX_LOSS = 300.0
_MIN_DELTA = 1e-10

# A server may plan any number of steps at any rate. Outside these limits PRV and PLD take minutes
# or gigabytes, or their rounding grows to the size of the loss. RDP is then used instead.
_MAX_GRID_STEPS = 2**17
_MIN_GRID_RATE = 1e-6
_MAX_PLD_STEPS = 2**20
# The library takes microseconds for each point of one step's loss: at the finest mesh, 65,000
# points cover this much.
_PLD_WIDTH = 6.5
# Raising a Fourier transform to a power multiplies its rounding by the number of steps, which
# changes δ. Against exact values, up to a tenth of this was seen.
_PLD_ROUNDING = 2.0**-52
# The rounding error in one step's divergence is below this. Times MAX_STEPS it is still small.
ROUNDING = 1e-14
MAX_STEPS = 10**9
_SLOW_NOISE = 50.0


@dataclass(frozen=True)
class Segment:
    """A sequence of private steps with one noise multiplier and one sampling rate.

    Parameters
    ----------
    noise_multiplier : float
        σ: standard deviation of the noise, in units of the clip norm; 0 means no noise.
    sample_rate : float
        q: probability that a record joins a step, above 0 and at most 1.
    steps : int
        Number of steps, from 0 to 1,000,000,000.

    Raises
    ------
    InvalidValue
        If a value is outside its range, or not a number.

    Examples
    --------
    >>> Segment(noise_multiplier=1.0, sample_rate=0.1, steps=100).steps
    100
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise InvalidValue("noise-multiplier", self.noise_multiplier, "a finite number from 0")
        if not 0 < self.sample_rate <= 1:
            raise InvalidValue("sample-rate", self.sample_rate, "a number above 0 and at most 1")
        if not 0 <= self.steps <= MAX_STEPS or self.steps != int(self.steps):
            raise InvalidValue("steps", self.steps, f"a whole number from 0 to {MAX_STEPS:,}")


def merge(history: Sequence[Segment]) -> tuple[Segment, ...]:
    """Join adjacent segments with the same σ and q, and drop segments without steps.

    Returns
    -------
    tuple[Segment, ...]
        The same steps in the same order, in plain Python numbers.
    """
    merged: list[Segment] = []
    for segment in history:
        rates = float(segment.noise_multiplier), float(segment.sample_rate)
        steps = int(segment.steps)
        if merged and (merged[-1].noise_multiplier, merged[-1].sample_rate) == rates:
            steps += merged.pop().steps
        if steps:
            merged.append(Segment(*rates, steps))
    return tuple(merged)


def rdp_epsilon(segments: Sequence[Segment], delta: float, *, coarse: bool = False) -> float:
    """Bound ε by Rényi divergences, which cover both directions of adjacency.

    Parameters
    ----------
    segments : Sequence[Segment]
        What was run; every σ above 0.
    delta : float
        δ, between 0 and 1.
    coarse : bool (default: False)
        Use few orders. This is faster, and ε is mostly within 10 % of the finer bound.

    Returns
    -------
    float
        ε, at least 0.

    References
    ----------
    Divergences: arXiv 1908.10530, section 3.3. Conversion: arXiv 1905.09982, theorem 21.
    """
    orders = _COARSE_ORDERS if coarse else _FINE_ORDERS + _LARGE_ORDERS
    alpha = np.asarray(orders)
    less, more = (np.log(delta) + np.log(alpha)) / (alpha - 1), np.log1p(-1 / alpha)
    best = math.inf
    # Divergences grow with the order, so the divergence at one order is a lower bound for all
    # larger ones. This rules out most orders, whose series then need not be summed.
    open_ranges = [(0, len(orders), 0.0)]
    while open_ranges:
        first, end, floor = open_ranges.pop()
        better = first + np.flatnonzero(floor - less[first:end] + more[first:end] < best)
        if better.size:
            first, middle, end = int(better[0]), int(better[better.size // 2]), int(better[-1]) + 1
            found = sum(s.steps * _rdp(s, orders[middle]) for s in segments)
            best = min(best, float(found - less[middle] + more[middle]))
            open_ranges.append((first, middle, floor))
            open_ranges.append((middle + 1, end, found if math.isfinite(found) else floor))
    return max(0.0, best)


def _rdp(segment: Segment, order: float) -> float:
    return step_divergence(segment.noise_multiplier, segment.sample_rate, order)


def step_divergence(sigma: float, rate: float, order: float) -> float:
    """Bound the Rényi divergence of one step at an order, in both directions.

    Parameters
    ----------
    sigma : float
        σ. At 0 the divergence is infinite.
    rate : float
        q, above 0 and at most 1.
    order : float
        α, above 1.

    References
    ----------
    arXiv 1908.10530, theorem 5 (directions) and section 3.3 (value).
    """
    return _one_divergence(sigma, rate, order)


@functools.lru_cache(maxsize=4096)
def _one_divergence(sigma: float, rate: float, order: float) -> float:
    return _divergence(sigma, rate, order) + ROUNDING


def _divergence(sigma: float, rate: float, order: float) -> float:
    _, rdp = opacus_analysis()
    if sigma > _SLOW_NOISE and abs(rate - 0.5) < 0.01 and order != int(order):
        # The series of a fractional order takes seconds here. (α-1) times the divergence is convex
        # in α and 0 at α = 1, so the line between its values at the two nearest whole orders is an
        # upper bound.
        low, share = int(order), order % 1
        below = (low - 1) * _divergence(sigma, rate, float(low)) if low > 1 else 0.0
        above = low * _divergence(sigma, rate, float(low + 1))
        return ((1 - share) * below + share * above) / (order - 1)
    try:
        value = float(rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=order))
    except (ValueError, ArithmeticError):
        # The series failed at this order. Infinity is always a valid bound.
        return math.inf
    return math.inf if math.isnan(value) else value


def prv_epsilon(segments: Sequence[Segment], delta: float) -> float | None:
    """Bound ε by numerical composition of privacy-loss random variables.

    Opacus has the variable of one direction only: the loss log(M/N) under M, where M is the output
    with the record and N the output with the record zeroed (*removal*). We know no proof that this
    direction stays the larger one under composition (see arXiv 2405.20769). This function therefore
    also computes the other direction, log(N/M) under N (*addition*), and returns the larger ε.

    The grid is chosen for each segment's number of steps rounded up to a power of two. The error
    bound grows with the number of steps, so the result holds for the actual number, too, and one
    grid serves while a client's history grows.

    Parameters
    ----------
    segments : Sequence[Segment]
        The steps that ran, joined by `merge`; every σ is above 0.
    delta : float
        δ, between 0 and 1.

    Returns
    -------
    float | None
        The upper bound on ε. It exceeds the true value by about 0.01 (by 0.001 where RDP's bound
        is below 1; by up to 1 % where a finer grid would be too large). None where every sufficient
        grid is too large, or where rounding would falsify the result.

    References
    ----------
    arXiv 2106.02848, theorem 5.5 and remark 5.6.
    """
    if delta < _MIN_DELTA or not _fits_a_grid(segments):
        return None
    planned = [
        Segment(s.noise_multiplier, s.sample_rate, 1 << (s.steps - 1).bit_length())
        for s in segments
    ]
    error, points, mesh = _grid(planned, delta)
    if not points:
        return None
    try:
        both = [
            _directed_epsilon(segments, delta, error, points, mesh, direction)
            for direction in ("remove", "add")
        ]
    except (RuntimeError, ValueError):  # Opacus found its own discretization unfit.
        return None
    return max(0.0, *both) if all(map(math.isfinite, both)) else None


def _fits_a_grid(segments: Sequence[Segment]) -> bool:
    return sum(s.steps for s in segments) <= _MAX_GRID_STEPS and all(
        s.sample_rate >= _MIN_GRID_RATE for s in segments
    )


def _grid(segments: Sequence[Segment], delta: float) -> tuple[float, int, float]:
    """Return the error in ε, the size and the mesh of a safe grid; size 0 if none is small enough.

    Extreme settings would take tens of gigabytes, so the size is worked out before memory is used.
    """
    total = sum(s.steps for s in segments)
    delta_error = delta / 1000
    half = rdp_epsilon(segments, delta_error / 4, coarse=True)
    for s in segments:
        once = Segment(s.noise_multiplier, s.sample_rate, 1)
        half = max(half, rdp_epsilon([once], delta_error / (8 * total), coarse=True))
    half += 3
    for error in _errors(rdp_epsilon(segments, delta, coarse=True)):
        mesh = error / math.sqrt(total * math.log(12 / delta_error) / 2)
        if half <= _MAX_LOSS and 2 * half / mesh <= _MAX_POINTS:
            return error, 2 * next_fast_len(math.ceil(half / mesh) + 1, real=True), mesh
    return 0.0, 0, 0.0


def _errors(bound: float) -> list[float]:
    """List the errors to try, given a rough ε: none above the larger of 0.01 and 1 % of ε."""
    return [e for e in (0.001, 0.01, 0.03, 0.1) if e <= max(0.01, bound / 100)][bound >= 1 :]


def _directed_epsilon(
    segments: Sequence[Segment],
    delta: float,
    error: float,
    points: int,
    mesh: float,
    direction: Direction,
) -> float:
    """Compose one direction's loss variables on a grid, and return the upper bound on ε."""
    parts = [
        step_loss(s.noise_multiplier, s.sample_rate, points, mesh, direction) for s in segments
    ]
    prv, _ = opacus_analysis()
    composed = prv.compose_heterogeneous(parts, [s.steps for s in segments])
    _, _, upper = composed.compute_epsilon(delta, delta / 1000, error)
    return float(upper)


def pld_epsilon(
    segments: Sequence[Segment], delta: float, *, interval: float = 1e-4
) -> float | None:
    """Bound ε by privacy-loss distributions, rounded up: the larger ε of the two directions.

    Parameters
    ----------
    segments : Sequence[Segment]
        What was run; every σ above 0.
    delta : float
        δ, between 0 and 1.
    interval : float (default: 1e-4)
        Mesh of the grid of the privacy loss. It is widened where ε is above 100 or σ is small, to
        limit memory and time.

    Returns
    -------
    float | None
        The upper bound on ε. None where the steps are too many, or where the rounding of the
        composition is not small against δ.

    References
    ----------
    The library dp-accounting; arXiv 2207.04380.
    """
    import dp_accounting
    from dp_accounting import pld

    steps = sum(s.steps for s in segments)
    rounding = _PLD_ROUNDING * steps
    if steps > _MAX_PLD_STEPS or rounding > delta / 10:
        return None
    bound = rdp_epsilon(segments, delta, coarse=True)
    widest = 1e-4 * max(map(_width, segments)) / _PLD_WIDTH
    interval = max(interval * max(1.0, bound / 100), widest)
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )
    for s in segments:
        noise = dp_accounting.GaussianDpEvent(s.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(s.sample_rate, noise)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, s.steps))
    return float(accountant.get_epsilon(delta - rounding))


def _width(segment: Segment) -> float:
    """Return about the largest loss of one step: at ten standard deviations beyond the record."""
    sigma = segment.noise_multiplier
    return (10 * sigma + 0.5) / sigma**2 + math.log(segment.sample_rate)


ACCOUNTANTS: Mapping[str, Callable[[Sequence[Segment], float], float | None]] = {
    "prv": prv_epsilon,
    "pld": pld_epsilon,
    "rdp": rdp_epsilon,
}
"""Accountants by name. Each takes a history and δ, and returns ε. It returns ``None`` where it
would take too much memory; `rdp_epsilon` is then used instead."""
