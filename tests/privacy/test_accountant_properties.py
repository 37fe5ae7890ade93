"""What holds for every accountant at any setting: order, composition, and both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from fedlora_flwr.privacy.accountants import ACCOUNTANTS, Segment
from fedlora_flwr.privacy.budget import epsilon_spent

every_accountant = pytest.mark.parametrize("accountant", ACCOUNTANTS)
rates = st.one_of(st.floats(1e-4, 1), st.just(1.0))
sigmas = st.floats(0.4, 20)
steps = st.integers(1, 500)
deltas = st.floats(-9, -1).map(lambda power: 10.0**power)


def spent(rate: float, sigma: float, count: int, delta: float, accountant: str) -> float:
    return epsilon_spent([Segment(sigma, rate, count)], delta, accountant).epsilon


def slack(epsilon: float) -> float:
    """Return what an accountant may add for its grid, which another setting may have finer."""
    return 1.1e-2 * max(1.0, epsilon)


# --- order ---


@every_accountant
@given(rate=rates, sigma=sigmas, count=steps, delta=deltas, more=st.floats(1, 3), data=st.data())
@settings(max_examples=20)
def test_epsilon_grows_with_q_and_steps_and_falls_with_noise_and_delta(
    accountant: str, rate: float, sigma: float, count: int, delta: float, more: float, data: Any
) -> None:
    here = spent(rate, sigma, count, delta, accountant)
    which = data.draw(st.sampled_from(["q", "sigma", "steps", "delta"]))
    there = {
        "q": lambda: spent(min(1.0, more * rate), sigma, count, delta, accountant),
        "sigma": lambda: spent(rate, sigma / more, count, delta, accountant),
        "steps": lambda: spent(rate, sigma, math.ceil(more * count), delta, accountant),
        "delta": lambda: spent(rate, sigma, count, delta / more, accountant),
    }[which]()
    allowed = 1e-9 * here if accountant == "rdp" else slack(here)
    assert there >= here - allowed, which


# --- composition ---


@every_accountant
@given(rate=rates, sigma=sigmas, first=steps, second=steps, delta=deltas)
@settings(max_examples=15)
def test_a_run_that_is_split_in_two_costs_what_one_run_costs(
    accountant: str, rate: float, sigma: float, first: int, second: int, delta: float
) -> None:
    """Here the accountants get two segments, which `epsilon_spent` would join."""
    account = ACCOUNTANTS[accountant]
    halves = account([Segment(sigma, rate, first), Segment(sigma, rate, second)], delta)
    whole = account([Segment(sigma, rate, first + second)], delta)
    if halves is None or whole is None:
        return  # A grid for one of them would be too large, and RDP answers.
    assert halves == pytest.approx(whole, rel=1e-9, abs=slack(whole) * (accountant != "rdp"))


# --- both directions ---


def removed(rate: float, sigma: float) -> Callable[[float], float]:
    """Return δ(ε) of one step with the record against one without it: P[L > ε] - e^ε Q[L > ε]."""

    def delta(epsilon: float) -> float:
        t = place(rate, sigma, epsilon)
        present = (1 - rate) * norm.sf(t / sigma) + rate * norm.sf((t - 1) / sigma)
        return float(present - math.exp(epsilon) * norm.sf(t / sigma))

    return delta


def added(rate: float, sigma: float) -> Callable[[float], float]:
    """Return δ(ε) of one step without the record against one with it."""

    def delta(epsilon: float) -> float:
        if rate < 1 and math.exp(-epsilon) <= 1 - rate:
            return 0.0  # No loss in this direction is larger than -log(1 - q).
        t = place(rate, sigma, -epsilon)
        present = (1 - rate) * norm.cdf(t / sigma) + rate * norm.cdf((t - 1) / sigma)
        return float(norm.cdf(t / sigma) - math.exp(epsilon) * present)

    return delta


def place(rate: float, sigma: float, loss: float) -> float:
    """Return the x at which log(1 - q + q·exp((2x - 1)/2σ²)) has a value."""
    return sigma**2 * math.log((math.exp(loss) - (1 - rate)) / rate) + 0.5


def solved(curve: Callable[[float], float], delta: float) -> float:
    if curve(0.0) <= delta:
        return 0.0
    return float(brentq(lambda epsilon: curve(epsilon) - delta, 0, 200))


@every_accountant
@given(rate=st.one_of(st.floats(0.01, 1), st.just(1.0)), sigma=st.floats(0.5, 10), delta=deltas)
@settings(max_examples=25)
def test_epsilon_covers_both_one_sided_curves(
    accountant: str, rate: float, sigma: float, delta: float
) -> None:
    exact = max(solved(curve(rate, sigma), delta) for curve in (removed, added))
    found = spent(rate, sigma, 1, delta, accountant)
    assert found >= exact - 1e-9
    if accountant != "rdp":
        assert found <= exact + slack(exact)


def test_the_curves_begin_at_one_point_and_differ_then() -> None:
    one, other = removed(0.5, 1.0), added(0.5, 1.0)
    assert one(0.3) > 1.2 * other(0.3) > 0
    assert one(0.0) == pytest.approx(other(0.0))
