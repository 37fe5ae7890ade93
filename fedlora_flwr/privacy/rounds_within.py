"""The number of rounds that a budget pays for, at a given noise."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.accountants import MAX_STEPS, Segment, rdp_epsilon
from fedlora_flwr.privacy.budget import epsilon_spent

__all__ = ["rounds_within"]

# After this many proposals the bracket is halved.
_PROPOSALS = 8
# ε jumps where another accountant answers, so a line through two points may be far too steep.
_STEEPEST = 2.0


def rounds_within(
    epsilon: float, delta: float, noise_multiplier: float, sample_rate: float, local_steps: int = 1
) -> int:
    """Find how many rounds a budget pays for: that many fit, and one more does not.

    A device's ledger asks the same accountant, so it admits a run of that many rounds and refuses
    one of one round more, if its records have no earlier runs.

    Parameters
    ----------
    epsilon : float
        The budget, above 0 and finite.
    delta : float
        δ, between 0 and 1.
    noise_multiplier : float
        σ, in units of the clip norm, from 0. Without noise no round fits.
    sample_rate : float
        q: probability that a record joins a step, above 0 and at most 1.
    local_steps : int (default: 1)
        K: private steps per round. A round of a secure sum is one step.

    Returns
    -------
    int
        T, from 0: the ε of T·K steps is at most `epsilon`, and the ε of (T + 1)·K steps is above
        it. Where all 1,000,000,000 steps that can be accounted for fit, T is what they make.

    Raises
    ------
    InvalidValue
        If an argument is out of range.

    References
    ----------
    ε is that of `fedlora_flwr.privacy.budget.epsilon_spent`: PRV, arXiv 2106.02848.

    Examples
    --------
    >>> rounds_within(8.0, delta=1e-3, noise_multiplier=0.8, sample_rate=0.1, local_steps=10)
    11
    """
    if not 0 < epsilon < math.inf:
        raise InvalidValue("epsilon", epsilon, "a finite number above 0")
    if not 1 <= local_steps <= MAX_STEPS or local_steps != int(local_steps):
        raise InvalidValue("local-steps", local_steps, f"a whole number from 1 to {MAX_STEPS:,}")

    def steps(rounds: int) -> list[Segment]:
        return [Segment(noise_multiplier, sample_rate, rounds * int(local_steps))]

    def spent(rounds: int) -> float:
        return epsilon_spent(steps(rounds), delta).epsilon

    def bound(rounds: int) -> float:
        # Rényi divergences add up, so their bound takes no new grid for another number of rounds.
        return rdp_epsilon(steps(rounds), delta, coarse=True)

    if spent(1) > epsilon:
        return 0
    return _search(spent, bound, epsilon, MAX_STEPS // int(local_steps))


def _search(
    spent: Callable[[int], float], bound: Callable[[int], float], budget: float, most: int
) -> int:
    """Narrow a bracket until only one round is between what fits and what does not.

    The bracket alone decides, so the answer holds at the border even where ε jumps because the
    accountant changes its grid. The bound is quick and only proposes what to try next: its distance
    from ε, in logarithms, is taken to follow a line through the last two points. One round has been
    seen to fit.
    """
    fits, above = 1, most + 1
    tried: list[tuple[float, float]] = []
    while above - fits > 1:
        if len(tried) < _PROPOSALS:
            guess = _bisect(
                lambda rounds: _log(bound(rounds)) + _distance(tried, rounds) <= _log(budget),
                fits,
                above,
            )
        else:
            guess = 2 * fits if above > most else (fits + above) // 2
        rounds = min(max(guess, fits + 1), above - 1)
        epsilon = spent(rounds)
        fits, above = (rounds, above) if epsilon <= budget else (fits, rounds)
        tried.append((math.log(rounds), _log(epsilon) - _log(bound(rounds))))
    return fits


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _log(epsilon: float) -> float:
    return math.log(min(max(epsilon, 1e-12), 1e12))


def _distance(tried: list[tuple[float, float]], rounds: int) -> float:
    """Return how far log ε is from that of the bound, as the last two points say."""
    if not tried:
        return 0.0
    x, y = tried[-1]
    if len(tried) == 1:
        return y
    slope = (y - tried[-2][1]) / (x - tried[-2][0])
    return y + min(max(slope, -_STEEPEST), _STEEPEST) * (math.log(rounds) - x)
