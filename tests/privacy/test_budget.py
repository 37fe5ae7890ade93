from __future__ import annotations

import math
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.privacy import accountants, budget, loss_grid
from fedlora_flwr.privacy.budget import (
    AccountantsDisagree,
    Segment,
    Spent,
    calibrate,
    check_budget,
    epsilon_spent,
)
from tests.privacy.support import own_cache

# σ for δ = 1e-5 and 1000 steps, by PLD: q -> {ε: σ}.
TABLE = {
    0.00768: {1: 1.182, 2: 0.856, 3: 0.745, 6: 0.599},
    0.00384: {1: 0.851, 2: 0.703, 3: 0.629, 6: 0.515},
    0.01140: {1: 1.563, 2: 1.026, 3: 0.857, 6: 0.668},
    0.00196: {1: 0.722, 2: 0.620, 3: 0.560, 6: 0.460},
    0.00256: {1: 0.764, 2: 0.649, 3: 0.585, 6: 0.480},
}
CASES = [(q, eps, sigma) for q, row in TABLE.items() for eps, sigma in row.items()]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from own_cache(tmp_path_factory)


# --- calibration ---


@pytest.mark.parametrize(("rate", "epsilon", "expected"), CASES)
def test_calibration_agrees_with_pld_table(rate: float, epsilon: float, expected: float) -> None:
    sigma = calibrate(epsilon, 1e-5, rate, 1000)

    assert sigma == pytest.approx(expected, rel=0.01)
    assert epsilon_spent([Segment(sigma, rate, 1000)], 1e-5).epsilon <= epsilon


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        *((8, 1e-3, 0.3, 100), (0.1, 1e-5, 0.01, 200), (30, 1e-4, 0.2, 50), (3, 1e-5, 1.0, 10)),
        *((50, 1e-3, 0.027, 4), (0.5, 1e-6, 0.4, 1000), (0.17, 1e-4, 0.026, 3)),
    ],
)
def test_calibration_is_safe_and_tight(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate(epsilon, delta, rate, steps)

    assert epsilon_spent([Segment(sigma, rate, steps)], delta).epsilon <= epsilon
    assert epsilon_spent([Segment(0.998 * sigma, rate, steps)], delta).epsilon > epsilon


def test_calibration_falls_back_on_rdp_where_prv_is_too_large() -> None:
    sigma = calibrate(1000.0, 1e-3, 0.5, 1000)

    spent = epsilon_spent([Segment(sigma, 0.5, 1000)], 1e-3)

    assert spent.accountant == "rdp"
    assert 990 < spent.epsilon <= 1000


def test_infinite_budget_needs_no_noise() -> None:
    assert calibrate(math.inf, 1e-5, 0.1, 100) == 0.0


@pytest.mark.parametrize("wrong", [0.9, 1.4])
def test_cross_check_refuses_a_wrong_figure(wrong: float) -> None:
    segment = Segment(1.0, 0.01, 1000)
    prv = accountants.prv_epsilon([segment], 1e-5)
    assert prv is not None

    budget._cross_check(segment, 1e-5, prv)
    with pytest.raises(AccountantsDisagree, match=f"PRV {wrong * prv:.6g}") as caught:
        budget._cross_check(segment, 1e-5, wrong * prv)

    assert isinstance(caught.value, FedLoRAError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.figures == caught.value.figures


# --- ε spent ---


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [(1.2, 0.3, 100, 1e-3), (0.46, 0.00196, 1000, 1e-5), (2.0, 0.1, 33, 1e-6), (3, 1.0, 5, 1e-5)],
)
def test_prv_agrees_with_opacus_and_lies_between_pld_and_rdp(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    from opacus.accountants import PRVAccountant

    history = [Segment(sigma, rate, steps)]
    opacus = PRVAccountant()
    opacus.history = [(sigma, rate, steps)]

    prv = epsilon_spent(history, delta)
    pld = epsilon_spent(history, delta, "pld")
    rdp = epsilon_spent(history, delta, "rdp")

    assert [s.accountant for s in (prv, pld, rdp)] == ["prv", "pld", "rdp"]
    assert prv.epsilon == pytest.approx(opacus.get_epsilon(delta), rel=0.01, abs=0.01)
    assert pld.epsilon <= prv.epsilon + 1e-3
    assert prv.epsilon <= rdp.epsilon
    assert prv.epsilon <= 1.02 * pld.epsilon + 0.01


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [
        (0.3, 0.05, 3),
        (0.8, 0.01, 900),
        (1.1, 0.6, 40),
        (4.0, 0.2, 1),
        (2.0, 1.0, 7),
        (9.0, 0.02, 5),
    ],
)
def test_rdp_is_the_least_over_all_orders(
    sigma: float, rate: float, steps: int, coarse: bool
) -> None:
    fine = (*accountants._FINE_ORDERS, 128.0, 256.0, 512.0)
    orders = np.asarray(accountants._COARSE_ORDERS if coarse else fine)
    once = np.asarray(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(orders)))
    for delta in (1e-2, 1e-6):
        bounds = steps * once + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
        found = accountants.rdp_epsilon([Segment(sigma, rate, steps)], delta, coarse=coarse)
        assert found == pytest.approx(max(0.0, bounds.min()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("sigma", "rate"), [(0.25, 0.01), (0.8, 0.3), (3.0, 1.0), (40.0, 1e-4)])
def test_the_mean_loss_is_what_opacus_integrates(sigma: float, rate: float) -> None:
    prv, _ = loss_grid.opacus_analysis()
    removed = prv.PoissonSubsampledGaussianPRV(rate, sigma)
    added = loss_grid._AdditionPRV(rate, sigma)
    with np.errstate(divide="ignore"):
        removal, addition = (
            prv.TruncatedPrivacyRandomVariable(loss, -150.0, 150.0).mean()
            for loss in (removed, added)
        )
    assert loss_grid.mean_loss(sigma, rate, "remove") == pytest.approx(removal, abs=1e-8)
    assert loss_grid.mean_loss(sigma, rate, "add") == pytest.approx(addition, abs=1e-8)


def exact_epsilon(
    p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], cell: float, delta: float
) -> float:
    """Solve ∫ max(0, p - e^ε q) = δ for ε, from the definition of (ε, δ)."""
    return float(
        brentq(lambda eps: np.maximum(0, p - math.exp(eps) * q).sum() * cell - delta, 0, 30)
    )


def densities(sigma: float, rate: float, steps: int) -> Sequence[npt.NDArray[np.float64]]:
    """Return the densities with and without the record, and the grid's mesh, for 1 or 2 steps."""
    x = np.linspace(-9 * sigma, 1 + 9 * sigma, 1201)
    without = norm.pdf(x, 0, sigma)
    present = (1 - rate) * without + rate * norm.pdf(x, 1, sigma)
    if steps == 2:
        present, without = np.outer(present, present), np.outer(without, without)
    return present, without, np.diff(x[:2]) ** steps


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.2), (1.0, 0.7), (0.5, 0.05), (1.5, 1.0)])
def test_epsilon_from_first_principles(sigma: float, rate: float, steps: int) -> None:
    delta = 1e-3
    present, without, cell = densities(sigma, rate, steps)
    exact = {
        "remove": exact_epsilon(present, without, float(cell[0]), delta),
        "add": exact_epsilon(without, present, float(cell[0]), delta),
    }
    history = [Segment(sigma, rate, steps)]
    error, points, mesh = accountants._grid(history, delta)

    removed = accountants._directed_epsilon(history, delta, error, points, mesh, "remove")
    added = accountants._directed_epsilon(history, delta, error, points, mesh, "add")

    assert exact["remove"] <= removed <= exact["remove"] + 1.5 * error
    assert exact["add"] <= added <= exact["add"] + 1.5 * error
    worst = max(exact.values())
    assert worst - 1e-4 <= epsilon_spent(history, delta).epsilon <= worst + 0.015
    assert epsilon_spent(history, delta, "pld").epsilon == pytest.approx(worst, abs=1e-3)
    assert epsilon_spent(history, delta, "rdp").epsilon >= worst


@pytest.mark.parametrize("accountant", accountants.ACCOUNTANTS)
def test_equal_neighbors_count_as_one_segment(accountant: str) -> None:
    halves = [Segment(1.0, 0.05, 60), Segment(1.0, 0.05, 0), Segment(1.0, 0.05, 60)]

    split = epsilon_spent(halves, 1e-5, accountant)

    assert split == epsilon_spent([Segment(1.0, 0.05, 120)], 1e-5, accountant)


def test_different_segments_compose() -> None:
    first, second = Segment(1.0, 0.05, 60), Segment(1.3, 0.02, 200)

    both = epsilon_spent([first, second], 1e-5).epsilon
    split = epsilon_spent([first, second, first], 1e-5).epsilon

    assert both == pytest.approx(epsilon_spent([first, second], 1e-5, "pld").epsilon, abs=0.02)
    assert both > epsilon_spent([first], 1e-5).epsilon
    merged = [Segment(1.0, 0.05, 120), second]
    assert split == pytest.approx(epsilon_spent(merged, 1e-5).epsilon, abs=1e-3)


@pytest.mark.parametrize(("sigma", "rate"), [(1.6, 0.3), (0.9, 0.01)])
def test_epsilon_grows_with_steps(sigma: float, rate: float) -> None:
    steps = [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]

    spent = [epsilon_spent([Segment(sigma, rate, k)], 1e-4).epsilon for k in steps]

    assert all(before < after for before, after in pairwise(spent))


@pytest.mark.parametrize("accountant", accountants.ACCOUNTANTS)
def test_no_steps_cost_nothing_and_no_noise_costs_everything(accountant: str) -> None:
    noiseless = [Segment(1.0, 0.1, 5), Segment(0.0, 0.1, 1)]

    assert epsilon_spent([], 1e-5, accountant) == Spent(0.0, accountant)
    assert epsilon_spent([Segment(0.0, 0.1, 0)], 1e-5, accountant) == Spent(0.0, accountant)
    assert epsilon_spent(noiseless, 1e-5, accountant) == Spent(math.inf, accountant)


def test_extreme_settings_do_not_take_the_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    spent = epsilon_spent([Segment(0.3, 0.5, 1000)], 1e-5)

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert spent.accountant == "rdp"
    assert 2000 < spent.epsilon < math.inf
    assert kilobytes < 2 * 1024**2


def test_delta_too_small_for_the_grid_is_answered_by_rdp() -> None:
    assert epsilon_spent([Segment(1.0, 0.1, 10)], 1e-12).accountant == "rdp"


# --- refusals ---


@pytest.mark.parametrize(
    ("values", "key", "allowed"),
    [
        ((0.0, 1e-5, 8, 812), "epsilon = 0.0", "above 0"),
        ((-1.0, 1e-5, 8, 812), "epsilon = -1.0", "above 0"),
        ((math.nan, 1e-5, 8, 812), "epsilon = nan", "above 0"),
        ((1.0, 0.0, 8, 812), "delta = 0.0", "above 0 and below 1/n = 0.00123"),
        ((1.0, 1 / 812, 8, 812), f"delta = {1 / 812}", "for a client of n = 812 records"),
        ((1.0, math.nan, 8, 812), "delta = nan", "below 1/n = 0.00123"),
        ((1.0, 1e-5, 0, 812), "batch-size = 0", "1 to 812"),
        ((1.0, 1e-5, 813, 812), "batch-size = 813", "1 to 812"),
        ((1.0, 1e-5, 1, 0), "num-records = 0", "at least 1"),
    ],
)
def test_bad_budget_is_refused_by_name_and_value(
    values: tuple[float, float, int, int], key: str, allowed: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        check_budget(*values)

    assert str(caught.value).startswith(f"{key} cannot be used")
    assert allowed in str(caught.value)


def test_good_budgets_pass() -> None:
    check_budget(1.0, 1e-5, 8, 812)
    check_budget(math.inf, 1e-5, 812, 812)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ((0.0, 1e-5, 0.1, 10), "epsilon = 0.0"),
        ((math.nan, 1e-5, 0.1, 10), "epsilon = nan"),
        ((5e-4, 1e-5, 0.1, 10), "epsilon = 0.0005"),
        ((1.0, 0.0, 0.1, 10), "delta = 0.0"),
        ((1.0, 1.0, 0.1, 10), "delta = 1.0"),
        ((1.0, 1e-5, 0.0, 10), "sample-rate = 0.0"),
        ((1.0, 1e-5, 1.1, 10), "sample-rate = 1.1"),
        ((1.0, 1e-5, math.nan, 10), "sample-rate = nan"),
        ((1.0, 1e-5, 0.1, 0), "steps = 0"),
        ((1.0, 1e-5, 0.1, -3), "steps = -3"),
        ((math.inf, 1e-5, 2.0, 10), "sample-rate = 2.0"),
    ],
)
def test_bad_calibration_is_refused_by_name_and_value(
    values: tuple[float, float, float, int], key: str
) -> None:
    with pytest.raises(InvalidValue) as caught:
        calibrate(*values)

    assert str(caught.value).startswith(f"{key} cannot be used")


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_bad_noise_is_refused(sigma: float) -> None:
    with pytest.raises(InvalidValue, match=f"noise-multiplier = {sigma}"):
        Segment(sigma, 0.1, 1)


@pytest.mark.parametrize("steps", [1.5, math.nan, math.inf, -math.inf])
def test_steps_that_cannot_be_counted_are_refused(steps: float) -> None:
    with pytest.raises(InvalidValue, match=f"steps = {steps}"):
        Segment(1.0, 0.1, steps)  # type: ignore[arg-type]


def test_bad_query_is_refused() -> None:
    with pytest.raises(InvalidValue, match="delta = 1"):
        epsilon_spent([], 1)
    with pytest.raises(InvalidValue, match=r"accountant = 'prw'.*did you mean 'prv'"):
        epsilon_spent([], 1e-5, "prw")


def test_import_is_light_and_leaves_logging_alone() -> None:
    code = """
import logging, sys
from fedlora_flwr.privacy import budget, accountants
assert not {"torch", "opacus", "dp_accounting"} & set(sys.modules)
accountants.prv_epsilon([budget.Segment(1.0, 0.1, 1)], 1e-3)
assert "opacus" in sys.modules
assert not logging.getLogger().handlers, logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
