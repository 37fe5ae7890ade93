"""From scores to choices: chances, leads, and what a run's choices are worth."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from fedlora_flwr.algebra.gains import Estimate
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import ASLoRA
from fedlora_flwr.strategies.choices import chance_of_a, lead, verdict
from tests.strategies.duels import Duels, known, layout_of


@pytest.mark.parametrize("noise", [1e-6, 1.0, 1e3])
def test_equal_truths_are_chosen_alike_and_no_choice_is_for_ever(noise: float) -> None:
    square = 0.1 * noise**2  # Far below what a round can tell.
    duels = Duels(lambda _: (square, square), noise, blocks=200)
    duels.run(30)
    shares = duels.shares(3)
    assert abs(shares.mean() - 0.5) < 0.06
    # Every one of the 200 runs trained either factor again and again.
    assert shares.min() > 0
    assert shares.max() < 1
    assert np.mean((shares > 0.1) & (shares < 0.9)) > 0.95


def test_equal_truths_without_any_noise_stay_a_coin_flip() -> None:
    duels = Duels(lambda _: (1.0, 1.0), 0.0, blocks=100)
    duels.run(20)
    assert 0.45 < duels.shares(4).mean() < 0.55
    assert all(abs(z or 0.0) < 1e-3 for z in itertools.chain(*duels.leads))


@pytest.mark.parametrize("curvature", ["none", "secant"])
@pytest.mark.parametrize("better", ["A", "B"])
def test_the_better_factor_is_chosen_where_its_lead_is_three_errors(
    better: str, curvature: str
) -> None:
    """A lead of three standard errors of what *one* round tells, in 200 runs of 20 rounds."""
    duels = Duels(lambda _: (0.0, 0.0), 1.0)
    gap = 3 * math.sqrt(2) * duels.error
    duels.squares = lambda _: (gap, 0.0) if better == "A" else (0.0, gap)
    duels.run(20, curvature=curvature)
    found = duels.shares(4) if better == "A" else 1 - duels.shares(4)
    # The rest of the rounds look whether the other is still the worse one.
    assert found.mean() > 0.9
    assert np.mean(found > 0.5) > 0.95
    duels.plans.clear()
    duels.run(20, curvature=curvature, score_drift=0.0)
    found = duels.shares(4) if better == "A" else 1 - duels.shares(4)
    assert found.mean() >= 0.95


def test_an_unlucky_first_draw_does_not_decide() -> None:
    """B is the better factor, and its first score says the opposite at 4 standard errors."""
    duels = Duels(lambda _: (0.0, 0.0), 1.0, blocks=40)
    error = duels.error
    duels.squares = lambda _: (0.0, 4 * error)
    strategy = ASLoRA(seed=0)
    strategy.num_rounds, strategy.warm_up = 60, 0.0
    strategy.scores = [known(0.0, -4 * error, error) for _ in range(40)]
    rng, layout = np.random.default_rng(0), duels.layout
    zeros = {n: np.zeros((2, 24) if factor_of(n) == "A" else (24, 2)) for n in layout.names}
    plans = []
    for server_round in range(2, 62):
        plans.append(str(strategy.plan(server_round, layout)))
        strategy.aggregate(
            server_round, zeros, duels.uploads(rng, 2, ComponentPlan.parse(plans[-1]))
        )
    share = np.array([[mode == "B" for mode in plan] for plan in plans])
    assert share[:5].mean() < 0.3
    assert share[-20:].mean() > 0.8


def test_scores_change_sides_when_the_truth_does() -> None:
    duels = Duels(lambda _: (0.0, 0.0), 1.0, blocks=20)
    gap = 6 * duels.error
    duels.squares = lambda t: (gap, 0.0) if t <= 30 else (0.0, gap)
    duels.run(100)
    table = np.array([[mode == "A" for mode in plan] for plan in duels.plans])
    assert table[10:30].mean() > 0.85
    assert table[-40:].mean() < 0.15


@pytest.mark.parametrize("z", [-3.0, -0.4, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_chance_is_that_of_a_larger_score_between_two_floors(
    z: float, temperature: float
) -> None:
    found = chance_of_a(z, "sample", temperature, 0.02)
    assert found == pytest.approx(min(max(NormalDist().cdf(z / temperature), 0.02), 0.98))
    assert chance_of_a(z, "argmax", temperature, 0.1) == [0.1, 0.5, 0.9][(z > 0) - (z < 0) + 1]


def test_the_lead_is_the_difference_in_standard_errors_of_both() -> None:
    assert lead(Estimate(5.0, 9.0), Estimate(1.0, 16.0)) == pytest.approx(4 / 5)
    assert lead(Estimate(1.0, 0.0), Estimate(1.0, 0.0)) == 0.0
    assert lead(Estimate(0.0, 0.0), Estimate(1e-9, 0.0)) == -1e6
    assert lead(Estimate(9.0, 1.0), Estimate(1.0, math.inf)) == 0.0
    assert lead(Estimate(5.0, 9.0), Estimate(1.0, 16.0), 2.0) == pytest.approx(4 / 13)


def test_draws_follow_their_chances_and_are_independent() -> None:
    blocks, rounds, strategy = (
        60,
        80,
        ASLoRA(seed=1, warm_up=0.0, score_decay=0.9999, score_drift=0.0),
    )
    strategy.scores = [known(0.0, 0.0 if i % 2 else -2 * math.sqrt(2)) for i in range(blocks)]
    layout = layout_of(blocks)
    table = np.array(
        [[m == "A" for m in str(strategy.plan(r, layout))] for r in range(1, rounds + 1)]
    )
    for first, chance in ((1, 0.5), (0, NormalDist().cdf(2.0))):
        share = table[:, first::2].mean()
        # Scores age from round to round, slowly.
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 2400) + 0.005
    signs = 2.0 * table[:, 1::2] - 1
    for one, other in ((signs[1:], signs[:-1]), (signs[:, 1:], signs[:, :-1])):
        assert abs((one * other).mean()) < 4 / math.sqrt(one.size)


def test_a_run_of_noise_says_that_its_choices_are_chance() -> None:
    sentences = set()
    for seed in range(10):
        duels = Duels(lambda _: (0.0, 0.0), 1.0, blocks=6, seed=seed)
        sentences.add(duels.run(20).remarks()["choices"].split(":")[0])
    assert sentences == {"cannot be told from chance"}


def test_a_run_with_a_clear_lead_says_how_clear() -> None:
    duels = Duels(lambda _: (2.0, 0.0), 0.05, blocks=6)
    found = duels.run(20).remarks()["choices"]
    assert found == (
        "follow the scores: in 100% of 108 choices between A and B, the scores differ by more than "
        "two standard errors; by chance it would be 5%"
    )
    assert ASLoRA().remarks() == {}
    assert verdict([], 0.9) == ""
