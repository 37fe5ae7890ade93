"""Lower bounds on ε: never above the truth more often than they may be, and near it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad  # type: ignore[import-untyped]
from scipy.stats import binom, norm  # type: ignore[import-untyped]

from fedlora_flwr.audit.bounds import (
    Scores,
    at_most,
    clopper_pearson,
    epsilon_of_mu,
    gaussian,
    most_right,
    one_run,
    one_run_gaussian,
)
from fedlora_flwr.errors import InvalidValue

DELTA, CONFIDENCE = 1e-3, 0.95


def scores(mu: float, trials: int, seed: int) -> tuple[Scores, Scores]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(trials), rng.standard_normal(trials) + mu


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (3, 20), (19, 20), (20, 20)])
def test_a_rate_is_bounded_as_the_binomial_distribution_says(hits: int, trials: int) -> None:
    bound = at_most(hits, trials, 0.05)
    assert hits / trials <= bound <= 1
    if hits < trials:
        assert binom.cdf(hits, trials, bound) == pytest.approx(0.05)


@pytest.mark.parametrize("mu", [0.3, 1.0, 1.2, 4.0])
def test_epsilon_of_a_gaussian_is_where_its_integral_says(mu: float) -> None:
    epsilon = epsilon_of_mu(mu, DELTA)

    def excess(x: float) -> float:
        return float(max(0.0, norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x)))

    beyond = epsilon / mu + mu / 2  # There the densities differ by exactly e^ε.
    assert quad(excess, beyond, beyond + 12)[0] == pytest.approx(DELTA, rel=1e-5)


def test_bounds_are_above_the_truth_as_rarely_as_they_may_be() -> None:
    mu = 1.2
    truth, above = epsilon_of_mu(mu, DELTA), {clopper_pearson: 0, gaussian: 0}
    for seed in range(200):
        found = scores(mu, 300, seed)
        for bound in above:
            above[bound] += bound(*found, DELTA, CONFIDENCE).epsilon > truth
    # Ten of 200 are expected at most; 20 or more come by chance once in 1,000 times.
    assert all(count < 20 for count in above.values())


def test_many_trials_come_near_the_truth() -> None:
    mu = 1.2
    truth, found = epsilon_of_mu(mu, DELTA), scores(mu, 20_000, 1)
    assert gaussian(*found, DELTA, CONFIDENCE).epsilon > 0.9 * truth
    assert 0.5 * truth < clopper_pearson(*found, DELTA, CONFIDENCE).epsilon < truth


def test_without_a_difference_nothing_is_found() -> None:
    found = scores(0.0, 2_000, 2)
    assert clopper_pearson(*found, DELTA, CONFIDENCE).epsilon < 0.2
    assert gaussian(*found, DELTA, CONFIDENCE).epsilon < 0.2


@pytest.mark.parametrize(("few", "what"), [([1.0] * 9, "absent"), ([math.nan] * 20, "absent")])
def test_scores_that_say_nothing_are_refused(few: list[float], what: str) -> None:
    with pytest.raises(InvalidValue, match=what):
        clopper_pearson(np.array(few), np.ones(20), DELTA, CONFIDENCE)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_of_randomized_response_is_bounded_by_its_epsilon(epsilon: float) -> None:
    """Each canary's guess is right with the largest chance that ε allows."""
    rng, right, above = np.random.default_rng(3), 1 / (1 + math.exp(-epsilon)), 0
    bounds = []
    for _ in range(200):
        correct = int(rng.binomial(1_000, right))
        bounds.append(one_run(correct, 1_000, 1_000, 0.0, CONFIDENCE).epsilon)
        above += bounds[-1] > epsilon
    assert above < 20
    assert np.mean(bounds) > 0.75 * epsilon


def test_a_delta_lowers_the_bound_of_one_run_and_abstaining_may_raise_it() -> None:
    plain = one_run(700, 1_000, 1_000, 0.0, CONFIDENCE).epsilon
    assert 0 < one_run(700, 1_000, 1_000, 1e-5, CONFIDENCE).epsilon < plain
    assert one_run(95, 100, 1_000, 0.0, CONFIDENCE).epsilon > plain
    assert one_run(500, 1_000, 1_000, 0.0, CONFIDENCE).epsilon == 0.0


def test_one_run_of_a_gaussian_is_bounded_by_its_mu() -> None:
    mu, rng, above = 1.0, np.random.default_rng(4), 0
    truth, bounds = epsilon_of_mu(mu, DELTA), []
    for _ in range(100):
        there = rng.integers(0, 2, 1_000)
        guesses = rng.standard_normal(1_000) + mu * there > mu / 2
        correct = int((guesses == there).sum())
        bounds.append(one_run_gaussian(correct, 1_000, 1_000, DELTA, CONFIDENCE).epsilon)
        above += bounds[-1] > truth
    assert above < 12
    assert np.mean(bounds) > 0.2 * truth


def test_counts_that_do_not_fit_are_refused() -> None:
    for counts in ((5, 4, 10), (4, 11, 10), (-1, 4, 10), (0, 0, 0)):
        with pytest.raises(InvalidValue, match="guesses"):
            one_run(*counts, DELTA, CONFIDENCE)


def test_nobody_is_right_more_often_than_the_best_threshold() -> None:
    mu, share = 1.2, 0.3
    at = np.linspace(-6, 8, 200_001)
    right = (1 - share) * norm.cdf(at) + share * norm.sf(at - mu)
    assert most_right(mu, share) == pytest.approx(right.max(), abs=1e-9)
    assert most_right(0.0, share) == 0.7


def test_uneven_errors_and_kinds_do_not_lift_the_bound() -> None:
    """A threshold far from the best one, and three times as many trials without the canary."""
    mu, above = 1.2, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        absent, present = rng.standard_normal(450), rng.standard_normal(150) + mu
        moved = np.where(absent < 1.1, absent - 5, absent), np.where(present < 1.1, -5.0, present)
        above += gaussian(*moved, DELTA, CONFIDENCE).epsilon > epsilon_of_mu(mu, DELTA)
    assert above < 20
