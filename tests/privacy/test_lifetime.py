"""A lifetime budget holds against a server that chooses each run after it has seen the last."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import BudgetExhausted, InvalidValue
from fedlora_flwr.privacy.account import (
    RDP_FILTER,
    UNBOUND,
    Account,
    Tally,
    Terms,
    admit,
    terms,
)
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.privacy.lifetime import (
    _ORDERS,
    allowance,
    calibrate_run,
    choose_order,
    filtered_epsilon,
    run_divergence,
)

DELTA = 1e-5
# σ at δ = 1e-5 for 1000 steps: q -> {ε: (one run of all of ε, what a filter would ask for)}.
TABLE = {
    0.00768: {1: (1.188, 1.278), 3: (0.745, 0.799)},
    0.00384: {1: (0.854, 1.018), 3: (0.630, 0.687)},
    0.01140: {1: (1.573, 1.675), 3: (0.858, 0.908)},
    0.00196: {1: (0.724, 0.912), 3: (0.561, 0.615)},
    0.00256: {1: (0.766, 0.948), 3: (0.585, 0.638)},
}
CASES = [(q, eps, *sigmas) for q, row in TABLE.items() for eps, sigmas in row.items()]


def account(run: str, run_epsilon: float = 1.0, epsilon: float = 3.0) -> Account:
    return Account("ward", run, epsilon, DELTA, "lifetime", run_epsilon)


def independent_divergence(segments: list[Segment], order: float) -> float:
    """Return the Rényi divergence of a history by dp-accounting."""
    accountant = rdp.RdpAccountant([order])
    for s in segments:
        step = dp_accounting.PoissonSampledDpEvent(
            s.sample_rate, dp_accounting.GaussianDpEvent(s.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, s.steps))
    return float(accountant._rdp[0])


# --- a case that the composed PRV lets pass ---

FIRST = Segment(2.5, 1.0, 1)
RARE = Segment(0.08, 9.9e-6, 1)  # Almost never anything, and then all.
MILD = Segment(0.4, 2.05e-3, 1)


def hockey_stick(step: Segment, eps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return δ(ε) of one step, from the definition, for ε of either sign."""
    sigma, q, bound = step.noise_multiplier, step.sample_rate, np.exp(eps)
    ratio = (bound - (1 - q)) / q
    x = np.where(ratio > 0, sigma**2 * np.log(np.where(ratio > 0, ratio, 1)) + 0.5, -np.inf)
    present = (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
    return np.asarray(present - bound * norm.sf(x / sigma))


def adaptive_epsilon(choices: list[Segment]) -> float:
    """Return ε of a server that reads `FIRST` and then takes the choice that tells it the most."""
    mu = 1 / FIRST.noise_multiplier
    z = np.linspace(-9, 9, 20_001)
    loss, weight = mu**2 / 2 + mu * z, norm.pdf(z) * (z[1] - z[0])

    def excess(eps: float) -> float:
        nothing = np.maximum(0, 1 - np.exp(eps - loss))
        told = [hockey_stick(step, eps - loss) for step in choices]
        return float((np.max([nothing, *told], axis=0) * weight).sum()) - DELTA

    return float(brentq(excess, 0, 30))


def test_the_composed_prv_is_no_filter() -> None:
    for second in (RARE, MILD):
        assert epsilon_spent([FIRST, second], DELTA).epsilon <= 3.0
    assert adaptive_epsilon([RARE, MILD]) > 3.25


@pytest.mark.parametrize("run_epsilon", [0.0, 1.0])
def test_runs_chosen_after_the_fact_do_not_get_past_the_ledger(
    tmp_path: Path, run_epsilon: float
) -> None:
    admitted = []
    for second in (RARE, MILD):
        ledger = Ledger(tmp_path / f"{second.noise_multiplier}.sqlite")
        ledger.record(account("run-1", run_epsilon), 1, FIRST, FIRST)
        try:
            ledger.record(account("run-2", run_epsilon), 1, second, second)
            admitted.append(second)
        except BudgetExhausted:
            pass
    assert len(admitted) < 2
    assert adaptive_epsilon(admitted) <= 3.0


# --- the filter ---

SIGMAS = st.floats(0.45, 30).map(lambda x: round(x, 3))
RATES = st.one_of(st.just(1.0), st.floats(1e-4, 0.9).map(lambda x: round(x, 5)))


@given(data=st.data(), epsilon=st.sampled_from([0.5, 1.0, 3.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_no_adaptive_server_gets_past_the_filter(data: st.DataObject, epsilon: float) -> None:
    """Each run may depend on all before it; whatever is admitted, an independent sum stays below.

    That all paths stay below the allowance at one order, fixed before the first release, is what
    the theorem asks for.
    """
    tallies: list[Tally] = []
    order = None
    for number in range(data.draw(st.integers(1, 6))):
        steps = data.draw(st.integers(1, 400))
        planned = Segment(data.draw(SIGMAS), data.draw(RATES), steps)
        owner = account(f"run-{number}", 0.5, epsilon)
        try:
            _, found = admit(owner, tallies, planned, data.draw(st.integers(1, steps)), 1e9)
        except BudgetExhausted:
            continue
        assert found is not None
        assert order in (None, found)
        order = found
        tallies.append(Tally(owner.run, planned, planned.steps, order, 0.0))
    if order is None:
        return
    taken = [t.mechanism for t in tallies]
    divergence = independent_divergence(taken, order)
    assert divergence <= allowance(epsilon, DELTA, order) * (1 + 1e-9) + 1e-9
    # The same through dp-accounting's own conversion, and through PRV of the path that was taken.
    accountant = rdp.RdpAccountant([order])
    for s in taken:
        step = dp_accounting.PoissonSampledDpEvent(
            s.sample_rate, dp_accounting.GaussianDpEvent(s.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, s.steps))
    assert accountant.get_epsilon(DELTA) <= epsilon * (1 + 1e-9)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_adaptive_server_gets_past_fixed_settings(data: st.DataObject) -> None:
    tallies: list[Tally] = []
    for number in range(data.draw(st.integers(1, 5))):
        planned = Segment(data.draw(SIGMAS), data.draw(RATES), data.draw(st.integers(1, 60)))
        try:
            admit(account(f"run-{number}", 0.0), tallies, planned, planned.steps, 1e9)
        except BudgetExhausted:
            continue
        tallies.append(Tally(f"run-{number}", planned, planned.steps, None, 0.0))
    if tallies:
        first = tallies[0].mechanism
        assert all(t.mechanism.noise_multiplier >= first.noise_multiplier for t in tallies)
        assert all(t.mechanism.sample_rate <= first.sample_rate for t in tallies)
        worst = replace(first, steps=sum(t.mechanism.steps for t in tallies))
        assert epsilon_spent([worst], DELTA).epsilon <= 3.0


def test_the_order_is_stored_with_the_first_row_and_never_changes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = Segment(0.8, 0.005, 100)
    ledger.record(account("run-1"), 1, first, first)
    order = choose_order(3.0, DELTA, first)
    # Neither other settings nor another budget change it.
    second = Segment(6.0, 0.5, 20)
    assert choose_order(5.0, DELTA, second) != order
    summary = ledger.record(account("run-2", epsilon=5.0), 1, second, second)
    assert ledger.terms(account("run-3")) == Terms(order=order)
    assert ledger.terms(account("run-3", 0.0)) == Terms(order=order)
    spent = filtered_epsilon(
        run_divergence(first, order) + run_divergence(second, order), DELTA, order
    )
    assert summary.epsilon == pytest.approx(spent, rel=1e-12)
    assert summary.accountant == RDP_FILTER


def test_a_filter_that_begins_late_takes_its_order_from_the_first_run() -> None:
    history = [Tally("old", Segment(0.8, 0.005, 100), 100, None, 0.0)]
    order = choose_order(3.0, DELTA, history[0].mechanism)
    assert terms(account("new"), history) == Terms(order=order)


def test_settings_of_earlier_runs_that_no_first_run_bounds_need_the_filter() -> None:
    history = [
        Tally("a", Segment(2.0, 0.01, 10), 10, None, 0.0),
        Tally("b", Segment(1.0, 0.01, 10), 10, None, 0.0),
    ]
    summary, order = admit(account("c", 0.0), history, Segment(3.0, 0.01, 5), 5, 1e9)
    assert order is not None
    assert summary.accountant == RDP_FILTER


def test_fixed_settings_count_a_milder_step_as_one_of_the_first_run() -> None:
    history = [Tally("a", Segment(2.0, 0.1, 10), 30, None, 0.0)]
    summary, order = admit(account("b", 0.0), history, Segment(4.0, 0.05, 10), 10, 1e9)
    assert (order, summary.accountant) == (None, "prv")
    assert summary.epsilon == epsilon_spent([Segment(2.0, 0.1, 20)], DELTA).epsilon
    for other in (Segment(1.9, 0.1, 1), Segment(2.0, 0.11, 1)):
        with pytest.raises(BudgetExhausted, match="fixed a noise multiplier of at least 2"):
            admit(account("b", 0.0), history, other, 1, 1e9)


# --- calibration ---


@pytest.mark.parametrize(("rate", "epsilon", "alone", "filtered"), CASES)
def test_calibration_agrees_with_the_table(
    rate: float, epsilon: float, alone: float, filtered: float
) -> None:
    one = calibrate(epsilon, DELTA, rate, 1000)
    under_filter = calibrate_run(epsilon, DELTA, rate, 1000, run_epsilon=epsilon)
    assert one == pytest.approx(alone, rel=0.01)
    assert under_filter == pytest.approx(filtered, rel=0.01)
    run = Segment(under_filter, rate, 1000)
    admit(account("run", epsilon, epsilon), [], run, 1000, 1e9)


@pytest.mark.parametrize(("rate", "runs"), [(0.00768, 6), (0.01140, 6), (0.00196, 13)])
def test_runs_of_a_third_of_the_budget(rate: float, runs: int) -> None:
    sigma = calibrate_run(3.0, DELTA, rate, 1000, run_epsilon=1.0)
    assert sigma == calibrate(1.0, DELTA, rate, 1000)
    one = Segment(sigma, rate, 1000)
    tallies: list[Tally] = []
    for number in range(runs):
        _, order = admit(account(f"run-{number}"), tallies, one, 1000, 1e9)
        tallies.append(Tally(f"run-{number}", one, 1000, order, 0.0))
    with pytest.raises(BudgetExhausted, match=r"\d+ steps of this kind are left"):
        admit(account("one more"), tallies, one, 1000, 1e9)


def test_a_plan_knows_the_scope_and_what_earlier_runs_have_fixed() -> None:
    config = RunConfig(
        epsilon=3.0, delta=DELTA, batch_size=50, num_rounds=100, local_steps=10,
        ledger_scope="lifetime",
    )  # fmt: skip
    rate = 50 / 10_000

    def sigma(run_epsilon: float = 0.0, terms: Terms = UNBOUND) -> float:
        run = replace(config, run_epsilon=run_epsilon)
        return calibrated_mechanism(run, 10_000, terms=terms).noise_multiplier

    assert sigma() == calibrate(3.0, DELTA, rate, 1000)
    assert sigma(run_epsilon=1.0) == calibrate(1.0, DELTA, rate, 1000)
    assert sigma(run_epsilon=3.0) == calibrate_run(3.0, DELTA, rate, 1000, run_epsilon=3.0)
    assert sigma(terms=Terms(order=6.0)) == calibrate_run(
        3.0, DELTA, rate, 1000, run_epsilon=3.0, order=6.0
    )
    assert sigma(terms=Terms(None, 2.5, 0.1)) == 2.5


@pytest.mark.parametrize("share", [0.0, -1.0, 3.1, math.nan])
def test_a_share_that_means_nothing_is_refused(share: float) -> None:
    with pytest.raises(InvalidValue, match="run-epsilon"):
        calibrate_run(3.0, DELTA, 0.1, 10, run_epsilon=share)


@pytest.mark.parametrize(
    ("epsilon", "delta", "first"),
    [
        (8.0, 1e-5, Segment(0.6, 0.033, 1)),
        (1.0, 1e-5, Segment(3.0, 0.1, 1)),
        (0.2, 1e-6, Segment(40.0, 0.2, 1)),
        (50.0, 1e-3, Segment(0.15, 1.0, 1)),
        (3.0, 1e-9, Segment(3e4, 1e-4, 1)),  # Divergences of the size of their rounding.
        (3.0, 1e-5, Segment(0.0, 0.1, 1)),  # Any order will do.
    ],
)
def test_no_order_admits_more_steps_than_the_one_that_is_chosen(
    epsilon: float, delta: float, first: Segment
) -> None:
    def steps(order: float) -> float:
        return allowance(epsilon, delta, order) / run_divergence(replace(first, steps=1), order)

    able = [order for order in _ORDERS if allowance(epsilon, delta, order) > 0]
    assert choose_order(epsilon, delta, first) == max(able, key=steps)


def test_a_budget_too_small_for_any_order_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"epsilon = 0\.001"):
        choose_order(1e-3, 1e-9, Segment(1.0, 0.1, 1))
