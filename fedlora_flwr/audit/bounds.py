"""Lower bounds on ε from the guesses of an attacker.

Each bound is a statement about a claim: if the claim of ε were true, guesses as good as these would
be seen with a probability of at most one minus the confidence. `clopper_pearson` assumes nothing
about the mechanism. `gaussian` and `one_run_gaussian` assume that its trade-off curve is that of a
Gaussian mechanism, and say how much privacy such a mechanism would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import log_ndtr, ndtr, ndtri  # type: ignore[import-untyped]
from scipy.stats import beta, binom  # type: ignore[import-untyped]

from fedlora_flwr.errors import InvalidValue

Scores = NDArray[np.float64]
LARGEST = 100.0
"""No bound is above this ε: so much would be no privacy at all."""


@dataclass(frozen=True)
class Bound:
    """A lower bound on ε.

    Parameters
    ----------
    epsilon : float
        The bound, at least 0.
    statistic : str
        Name of the statistic.
    assumes : str
        What the bound assumes about the mechanism; empty for nothing.
    """

    epsilon: float
    statistic: str
    assumes: str = ""


def rates_at(absent: Scores, present: Scores, threshold: float) -> tuple[int, int]:
    """Return false alarms and misses of an attacker who says "present" above a threshold."""
    return int((absent > threshold).sum()), int((present <= threshold).sum())


def at_most(hits: int, trials: int, error: float) -> float:
    """Bound a probability from above, by Clopper and Pearson (1934).

    Parameters
    ----------
    hits, trials : int
        How often something happened, and in how many independent trials.
    error : float
        Probability with which the bound may be wrong.
    """
    return 1.0 if hits == trials else float(beta.ppf(1 - error, hits + 1, trials - hits))


def epsilon_of_rates(false_alarms: float, misses: float, delta: float) -> float:
    """Return the smallest ε that allows an attacker with these rates (arXiv 1311.0776, eq. 2)."""
    bounds = [
        math.log((1 - delta - first) / second)
        for first, second in ((false_alarms, misses), (misses, false_alarms))
        if second > 0 and 1 - delta - first > 0
    ]
    return min(max([0.0, *bounds]), LARGEST)


def delta_of_mu(mu: float, epsilon: float) -> float:
    """Return δ(ε) of a Gaussian mechanism with sensitivity over deviation ``mu`` (1905.02383)."""
    if mu <= 0:
        return 0.0
    above, below = log_ndtr(-epsilon / mu + mu / 2), log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(above) - math.exp(epsilon + below))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact ε of the Gaussian mechanism with sensitivity over deviation ``mu``.

    References
    ----------
    arXiv 1805.06530, theorem 8. The two terms are subtracted as logarithms, so that no ε overflows.
    """

    def excess(epsilon: float) -> float:
        first = log_ndtr(mu / 2 - epsilon / mu)
        second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        if second >= first:
            return -math.inf
        return float(first + np.log(-np.expm1(second - first)) - math.log(delta))

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(lambda e: max(excess(e), -1e3), 0, mu * mu / 2 + 50 * mu + 1, xtol=1e-14))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return ε of a Gaussian mechanism as a bound states it: at most `LARGEST`."""
    return min(gaussian_epsilon(mu, delta), LARGEST)


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """Return μ of the Gaussian mechanism that has ε at ``delta`` (see `epsilon_of_mu`)."""
    return float(brentq(lambda mu: delta_of_mu(mu, epsilon) - delta, 0.0, 2 * LARGEST))


def clopper_pearson(absent: Scores, present: Scores, delta: float, confidence: float) -> Bound:
    """Bound ε by the two rates of a threshold (Jagielski et al., arXiv 2006.07709).

    The threshold is chosen on a third of the trials and counted on the others, so that the choice
    costs no confidence.

    Parameters
    ----------
    absent, present : ndarray
        The attacker's scores in independent trials without and with the canary, shape (trials,).
        A larger score means "present".
    delta : float
        δ of the claim.
    confidence : float
        E.g. 0.95. Half of what is left is the error of each rate.

    Raises
    ------
    InvalidValue
        There are fewer than 10 trials of a kind, or a score is not finite.
    """
    first, rest = _parts(absent, present, 3)

    def value(scores: tuple[Scores, Scores], threshold: float) -> float:
        trials = len(scores[0]), len(scores[1])
        return epsilon_of_rates(*_rates(rates_at(*scores, threshold), trials, confidence), delta)

    quantiles = np.unique(np.quantile(np.concatenate(first), np.linspace(0.01, 0.99, 99)))
    best = max(quantiles, key=lambda threshold: value(first, threshold))
    return Bound(value(rest, float(best)), "Clopper-Pearson")


def gaussian(absent: Scores, present: Scores, delta: float, confidence: float) -> Bound:
    """Bound μ by the share of right guesses, and read it as an ε at ``delta`` (1905.02383).

    No attacker on a μ-GDP mechanism is right with a larger probability than `most_right`. The
    number of right guesses has the tail of a binomial distribution with that mean at most
    (Hoeffding, 1956), also where the two kinds of errors differ. The threshold lies halfway between
    the medians of a tenth of the trials. The other trials are counted.

    Parameters
    ----------
    absent, present, delta, confidence
        As for `clopper_pearson`.

    Raises
    ------
    InvalidValue
        As `clopper_pearson`.
    """
    first, rest = _parts(absent, present, 10)
    threshold = float(np.median(first[0]) + np.median(first[1])) / 2
    wrong, trials = sum(rates_at(*rest, threshold)), sum(map(len, rest))
    least = 1 - at_most(wrong, trials, 1 - confidence)
    share = len(rest[1]) / trials
    mu = _largest(lambda mu: most_right(mu, share) < least)
    return Bound(epsilon_of_mu(mu, delta), "Gaussian fit", "the curve of a Gaussian mechanism")


def bounds_of(absent: Scores, present: Scores, delta: float, confidence: float) -> list[Bound]:
    """Return `clopper_pearson` and `gaussian` of the same trials, which hold together (Bonferroni).

    Parameters
    ----------
    absent, present, delta
        As for `clopper_pearson`.
    confidence : float
        Of both bounds together.

    Raises
    ------
    InvalidValue
        As `clopper_pearson`.
    """
    each = 1 - (1 - confidence) / 2
    return [bound(absent, present, delta, each) for bound in (clopper_pearson, gaussian)]


def most_right(mu: float, share: float) -> float:
    """Return the largest probability of a right guess on a μ-GDP mechanism.

    Parameters
    ----------
    mu : float
        μ.
    share : float
        Share of the trials in which the canary is present.
    """
    if mu <= 0:
        return max(share, 1 - share)
    shift = math.log(share / (1 - share)) / mu
    return float(share * ndtr(mu / 2 + shift) + (1 - share) * ndtr(mu / 2 - shift))


def one_run(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> Bound:
    """Bound ε by the correct guesses about many canaries of one run (2305.08846, theorem 5.2).

    Parameters
    ----------
    correct, guesses : int
        Guesses that were right, and all guesses; the attacker may abstain.
    canaries : int
        Canaries, each in or out by a fair coin of its own.
    delta, confidence : float
        As for `clopper_pearson`.

    Raises
    ------
    InvalidValue
        The counts do not fit together.
    """
    _check_guesses(correct, guesses, canaries)
    error = 1 - confidence

    def chance(epsilon: float) -> float:
        """Return how likely it is to be so often right under a true claim."""
        right = 1 / (1 + math.exp(-epsilon))
        steps = np.arange(1, correct + 1)
        below = binom.cdf(correct - 1, guesses, right)
        # P[correct > Binomial >= correct - i], for each i.
        shares = below - binom.cdf(correct - 1 - steps, guesses, right)
        slack = 2 * float(np.max(shares / steps)) if correct else 0.0
        return float(binom.sf(correct - 1, guesses, right)) + slack * canaries * delta

    return Bound(_largest(lambda epsilon: chance(epsilon) < error), "one run")


def one_run_gaussian(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float
) -> Bound:
    """Bound μ by the correct guesses of one run, and read it as an ε (2410.22235, theorem 9).

    Parameters
    ----------
    correct, guesses, canaries, delta, confidence
        As for `one_run`.

    Raises
    ------
    InvalidValue
        The counts do not fit together.
    """
    _check_guesses(correct, guesses, canaries)
    error = (1 - confidence) * guesses / canaries

    def refuted(mu: float) -> bool:
        """Whether a μ-GDP mechanism allows so many right guesses with too small a probability."""
        right, wrong = error * correct / guesses, error * (guesses - correct) / guesses
        for number in range(correct - 1, -1, -1):
            more = max(wrong, float(ndtr(ndtri(right) - mu)))
            right += number / (guesses - number) * (more - wrong)
            wrong = more
        return right + wrong > guesses / canaries

    mu = _largest(refuted)
    return Bound(epsilon_of_mu(mu, delta), "one run, Gaussian", "the curve of a Gaussian mechanism")


def _rates(
    counts: tuple[int, int], trials: tuple[int, int], confidence: float
) -> tuple[float, float]:
    error = (1 - confidence) / 2
    return at_most(counts[0], trials[0], error), at_most(counts[1], trials[1], error)


def _parts(
    absent: Scores, present: Scores, share: int
) -> tuple[tuple[Scores, Scores], tuple[Scores, Scores]]:
    """Return one in so many trials, to choose a threshold by, and the others, to count."""
    for name, scores in (("absent", absent), ("present", present)):
        if len(scores) < 10 or not np.isfinite(scores).all():
            raise InvalidValue(name, scores, "at least 10 scores, each a finite number")
    few = len(absent) // share, len(present) // share
    return (absent[: few[0]], present[: few[1]]), (absent[few[0] :], present[few[1] :])


def _largest(refuted: Callable[[float], bool]) -> float:
    """Return the largest parameter that is refuted; refuting gets harder as it grows."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < LARGEST:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check_guesses(correct: int, guesses: int, canaries: int) -> None:
    if not 0 <= correct <= guesses <= canaries or not canaries:
        allowed = "0 <= correct <= guesses <= canaries"
        raise InvalidValue("guesses", (correct, guesses, canaries), allowed)
