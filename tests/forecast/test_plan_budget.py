"""ε, noise and rounds from each other, against accountants that are called directly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld
from opacus.accountants import RDPAccountant
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.errors import BudgetExhausted, InvalidValue
from fedlora_flwr.forecast.plan_budget import plan_budget
from fedlora_flwr.plots.budget import budget_figure
from fedlora_flwr.privacy.budget import Segment, epsilon_spent
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.rounds_within import rounds_within
from fedlora_flwr.secure_sum.accounting import epsilon_of_sum
from fedlora_flwr.secure_sum.grid import Grid
from tests.privacy.support import own_cache


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from own_cache(tmp_path_factory)


def by_pld(sigma: float, rate: float, steps: int, delta: float) -> float:
    """ε of dp-accounting, without any code of the package."""
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    step = PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))
    accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def by_opacus(sigma: float, rate: float, steps: int, delta: float) -> float:
    """ε of Opacus' Rényi accountant, without any code of the package."""
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(delta))


# ε, δ, σ, q, K
SETTINGS = [
    (3.0, 1e-5, 1.0, 128 / 11228, 10),
    (1.0, 1e-5, 2.0, 0.01, 1),
    (8.0, 1e-3, 0.8, 0.1, 10),
    (20.0, 1e-5, 0.5, 0.05, 4),  # The answer is the last before a new grid.
    (3.0, 1e-5, 5.0, 0.14, 1),  # A secure sum: one step per round.
]


@pytest.mark.parametrize(("epsilon", "delta", "sigma", "rate", "steps"), SETTINGS)
def test_so_many_rounds_fit_and_one_more_does_not(
    epsilon: float, delta: float, sigma: float, rate: float, steps: int
) -> None:
    rounds = rounds_within(epsilon, delta, sigma, rate, steps)

    def spent(count: int) -> float:
        return epsilon_spent([Segment(sigma, rate, count * steps)], delta).epsilon

    assert rounds > 1
    assert spent(rounds) <= epsilon < spent(rounds + 1)


@pytest.mark.parametrize(("epsilon", "delta", "sigma", "rate", "steps"), SETTINGS)
def test_the_rounds_are_those_of_other_accountants(
    epsilon: float, delta: float, sigma: float, rate: float, steps: int
) -> None:
    """PLD gives the least ε and Rényi divergences the largest, so the border is between theirs."""
    rounds = rounds_within(epsilon, delta, sigma, rate, steps)

    assert by_pld(sigma, rate, rounds * steps, delta) <= epsilon
    # PRV's own error is up to 0.03 for ε above 10, and less below.
    beyond = rounds + 1 + math.ceil(rounds * 0.02)
    assert by_pld(sigma, rate, beyond * steps, delta) > epsilon
    assert by_opacus(sigma, rate, (rounds + 1) * steps, delta) > epsilon


def test_where_prv_does_not_answer_the_rounds_are_those_of_renyi_divergences() -> None:
    rounds = rounds_within(8.0, 1e-6, 1.0, 0.001, 5)

    assert rounds * 5 > 2**17
    # Opacus has fewer orders, so its ε may be a little larger and never smaller.
    assert by_opacus(1.0, 0.001, (rounds + 1) * 5, 1e-6) > 8
    assert by_opacus(1.0, 0.001, rounds * 5, 1e-6) == pytest.approx(8, rel=1e-3)


def test_a_ledger_admits_the_rounds_and_refuses_one_more(tmp_path: Path) -> None:
    rounds = rounds_within(3.0, 1e-5, 2.0, 0.05, 4)
    account = Account("client", "run", 3.0, 1e-5)
    once = Segment(2.0, 0.05, 4)
    plan, more = Segment(2.0, 0.05, rounds * 4), Segment(2.0, 0.05, rounds * 4 + 4)

    summary = Ledger(tmp_path / "fits.sqlite").record(account, 1, once, plan)
    assert summary.epsilon <= 3
    with pytest.raises(BudgetExhausted):
        Ledger(tmp_path / "above.sqlite").record(account, 1, once, more)


def test_a_secure_sum_of_so_many_rounds_keeps_the_budget_of_the_union() -> None:
    """One step per round, at the run's own rate; the slack of whole numbers changes nothing."""
    found = plan_budget(
        delta=1e-4, epsilon=3.0, noise_multiplier=5.0, sample_rate=0.14, records=2000
    )

    grid = Grid.of(5.0, shares=8, norm=2**20)
    assert epsilon_of_sum(grid, 0.14, found.rounds, 1e-4, 20_000).epsilon <= 3
    assert epsilon_of_sum(grid, 0.14, found.rounds + 1, 1e-4, 20_000).epsilon > 3


def test_no_round_fits_a_small_budget_and_none_without_noise() -> None:
    assert rounds_within(0.1, 1e-5, 0.5, 0.1) == 0
    assert rounds_within(8.0, 1e-5, 0.0, 0.1) == 0
    found = plan_budget(delta=1e-5, epsilon=0.1, noise_multiplier=0.5, sample_rate=0.1)
    assert (found.rounds, found.epsilon["prv"]) == (0, 0)
    assert found.epsilon_of_one_more is not None
    assert found.epsilon_of_one_more > 0.1


def test_the_answer_ends_at_the_most_steps_that_are_counted() -> None:
    assert rounds_within(3.0, 1e-5, 1e4, 0.001, 3) == 333_333_333
    found = plan_budget(delta=1e-5, epsilon=3, noise_multiplier=1e4, sample_rate=0.001)
    assert (found.rounds, found.epsilon_of_one_more) == (1_000_000_000, None)


def test_each_of_the_three_follows_from_the_other_two() -> None:
    given: dict[str, Any] = {
        "delta": 1e-5, "records": 2000, "batch_size": 100, "local_steps": 5,
    }  # fmt: skip
    noise = plan_budget(epsilon=3.0, rounds=20, **given)
    spent = plan_budget(noise_multiplier=noise.noise_multiplier, rounds=20, **given)
    rounds = plan_budget(epsilon=3.0, noise_multiplier=noise.noise_multiplier, **given)

    solved = [found.solved_for for found in (noise, spent, rounds)]
    assert solved == ["noise-multiplier", "epsilon", "rounds"]
    assert noise.sample_rate == 0.05
    assert by_pld(noise.noise_multiplier, 0.05, 100, 1e-5) == pytest.approx(3, rel=0.01)
    assert spent.epsilon == noise.epsilon == rounds.epsilon
    assert (rounds.rounds, rounds.steps) == (20, 100)
    assert spent.epsilon_budget == spent.epsilon["prv"]


def test_curves_pass_through_the_plan_and_say_what_each_point_means(tmp_path: Path) -> None:
    found = plan_budget(delta=1e-5, epsilon=3, noise_multiplier=1.0, sample_rate=0.1, local_steps=2)
    curves = found.curves

    assert curves["rounds"].iloc[[0, -1]].tolist() == [1, round(found.rounds * 100 / 49)]
    assert curves["epsilon"].is_monotonic_increasing
    assert curves["noise_multiplier"].is_monotonic_increasing
    (here,) = curves[curves["rounds"] == found.rounds].to_dict("records")
    assert here["epsilon"] == found.epsilon["prv"]
    assert here["noise_multiplier"] <= 1.001
    last = curves.iloc[-1]
    steps = int(last["rounds"]) * 2
    assert by_pld(1.0, 0.1, steps, 1e-5) == pytest.approx(last["epsilon"], rel=0.01)
    assert by_pld(last["noise_multiplier"], 0.1, steps, 1e-5) == pytest.approx(3, rel=0.01)

    figure = budget_figure(curves, found.rounds, 3.0, 1.0, 1e-5)
    for axes, column in zip(figure.axes, ("epsilon", "noise_multiplier"), strict=True):
        np.testing.assert_array_equal(np.asarray(axes.lines[0].get_ydata()), curves[column])
    found.plot(tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"epsilon": 3.0}, "given = 'epsilon'"),
    ({"epsilon": 3.0, "noise_multiplier": 1.0, "rounds": 2}, "given = 'epsilon, noise-multiplier"),
    ({"epsilon": 3.0, "rounds": 2, "sample_rate": None}, "batch-size = None"),
    ({"epsilon": 3.0, "rounds": 2, "sample_rate": None, "batch_size": 2}, "records = None"),
    ({"epsilon": 3.0, "rounds": 2, "batch_size": 5}, "batch-size = 5"),
    ({"epsilon": 3.0, "rounds": 2, "records": 1000}, "delta = 0.001"),
    ({"epsilon": 3.0, "rounds": 0}, "rounds = 0"),
    ({"epsilon": 3.0, "rounds": 2, "local_steps": 0}, "local-steps = 0"),
    ({"epsilon": 3.0, "rounds": 10**9, "local_steps": 2}, "from 1 to 500,000,000"),
    ({"epsilon": math.inf, "noise_multiplier": 1.0}, "epsilon = inf"),
    ({"epsilon": 3.0, "noise_multiplier": -1.0}, "noise-multiplier = -1.0"),
    ({"epsilon": 3.0, "noise_multiplier": 1.0, "sample_rate": 1.5}, "sample-rate = 1.5"),
    ({"rounds": 2, "noise_multiplier": 1.0, "delta": 0.0}, "delta = 0.0"),
]


@pytest.mark.parametrize(("values", "named"), BAD)
def test_what_cannot_be_answered_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        plan_budget(**{"delta": 1e-3, "sample_rate": 0.1, **values})
    assert named in str(refused.value)


def test_no_curves_without_noise() -> None:
    found = plan_budget(delta=1e-5, noise_multiplier=0.0, rounds=3, sample_rate=0.1)
    assert found.epsilon_budget == math.inf
    with pytest.raises(InvalidValue, match="epsilon = inf"):
        _ = found.curves


def budget(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["budget", *words])
    assert result.exit_code == code, result.output
    return result.output


COMMON = ("--delta", "1e-5", "--sample-rate", "0.01", "--noise-multiplier", "2")


def test_the_command_tells_rounds_and_the_border(tmp_path: Path) -> None:
    lines = budget(*COMMON, "--epsilon", "1").splitlines()
    assert lines[0] == "rounds T = 2387  (2387 steps; one round more would spend ε = 1.00003)"
    assert lines[1] == "noise multiplier σ = 2.0000  (q = 0.01000)"

    picture = tmp_path / "b.png"
    words = [*COMMON, "--rounds", "3", "--local-steps", "4", "--plot", str(picture), "--json"]
    found = json.loads(budget(*words))
    assert (found["steps"], found["plot"]) == (12, str(picture))
    assert picture.exists()
    assert json.loads(budget(*COMMON, "--steps", "12", "--json"))["epsilon"] == found["epsilon"]


def test_the_command_refuses_steps_beside_rounds() -> None:
    said = budget(*COMMON, "--rounds", "3", "--steps", "12", code=1)
    assert said.startswith("Error: steps = 12 cannot be used")
