"""What a secure sum promises, against dp-accounting's own discrete Gaussian."""

import dataclasses
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from fedlora_flwr.errors import BudgetExhausted, InvalidValue
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.lifetime import choose_order, filtered_epsilon, run_divergence
from fedlora_flwr.secure_sum.accounting import epsilon_of_sum, epsilon_unmasked
from fedlora_flwr.secure_sum.cohort import check_union, honest_shares
from fedlora_flwr.secure_sum.grid import Grid


@pytest.mark.parametrize(("norm", "sigma"), [(3, 2.0), (8, 1.0), (40, 1.1)])
def test_the_integers_are_no_less_private_than_is_said(norm: int, sigma: float) -> None:
    """One coordinate, which is what dp-accounting knows: a record moves an integer by Δ."""
    grid, rate, steps, delta = Grid.of(sigma, 4, norm), 0.1, 50, 1e-5
    deviation = (grid.shares * grid.deviation**2) ** 0.5
    exact = pld.from_discrete_gaussian_mechanism(
        deviation, sensitivity=norm, sampling_prob=rate, value_discretization_interval=1e-4
    ).self_compose(steps)

    said = epsilon_of_sum(grid, rate, steps, delta, 1).epsilon

    assert exact.get_epsilon_for_delta(delta) <= said + 2e-3
    # On so coarse a grid some noise is given up; it is little from Δ = 40 on.
    assert said < exact.get_epsilon_for_delta(delta) * (1.02 if norm == 40 else 1.6)


def test_a_fine_grid_spends_what_the_accountant_says_for_the_union() -> None:
    rate, steps, delta = 0.14, 100, 5e-4
    sigma = calibrate(1.0, delta, rate, steps)

    spent = epsilon_of_sum(Grid.of(sigma, 8, 2**20), rate, steps, delta, 20_000)

    assert spent.accountant == "prv"
    assert spent.epsilon == pytest.approx(
        epsilon_spent([Segment(sigma, rate, steps)], delta).epsilon, rel=1e-4
    )
    assert spent.epsilon <= 1


def test_slack_is_added_where_there_is_some() -> None:
    coarse = Grid(40, 2, 4)
    far = dataclasses.replace(coarse, deviation=4, shares=1)
    near = epsilon_of_sum(coarse, 0.1, 10, 1e-5, 1).epsilon
    wide = epsilon_of_sum(coarse, 0.1, 10, 1e-5, 1000).epsilon

    assert wide > near
    assert coarse.slack(1000, 10) > 1e-13 > far.slack(1000, 10)


def test_one_upload_without_masks_has_the_noise_of_one_share() -> None:
    rounds = Segment(2.0, 0.1, 20)

    alone = epsilon_unmasked(2.0, 4, rounds, 1e-4)

    assert alone == epsilon_spent([dataclasses.replace(rounds, noise_multiplier=1.0)], 1e-4)
    assert alone.epsilon > 2 * epsilon_spent([rounds], 1e-4).epsilon


def test_delta_is_checked_against_the_union() -> None:
    check_union(5e-4, 1437)
    with pytest.raises(InvalidValue, match="1,437 records of all clients"):
        check_union(1e-3, 1437)


@pytest.mark.parametrize("numbers", [(10, 5, 5), (10, 11, 0), (10, -1, 0), (10, 0, -1)])
def test_somebody_has_to_be_left(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidValue, match="fewer than the 10 clients"):
        honest_shares(*numbers)


def test_a_lifetime_adds_up_releases_of_both_trust_models(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    own, shared = Segment(1.5, 0.1, 10), Segment(4.0, 0.14, 10)
    # The owner lets each run spend a part, so that a filter adds up whatever settings they have.
    first = Account("ward", "first", 4.0, 1e-5, "lifetime", run_epsilon=3.0)
    second = dataclasses.replace(first, run="second")

    ledger.record(first, 1, own, own)
    both = ledger.record(second, 1, shared, shared, "secure-sum, 1 of 8 shares")

    order = choose_order(4.0, 1e-5, own)
    total = run_divergence(own, order) + run_divergence(shared, order)
    assert both.epsilon == pytest.approx(filtered_epsilon(total, 1e-5, order))
    assert both.steps == 20
    more, third = dataclasses.replace(shared, steps=2000), dataclasses.replace(first, run="third")
    with pytest.raises(BudgetExhausted):
        ledger.record(third, 1, more, more, "secure-sum, 1 of 8 shares")
