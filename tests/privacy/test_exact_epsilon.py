"""No accountant is below the exact ε where that is known: a Gaussian mechanism, in 60 digits."""

from __future__ import annotations

import math

import mpmath as mp  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.audit.bounds import gaussian_epsilon
from fedlora_flwr.privacy.accountants import ACCOUNTANTS, Segment, pld_epsilon

every_accountant = pytest.mark.parametrize("accountant", ACCOUNTANTS)


def in_sixty_digits(mu: float, delta: float) -> float:
    """Bisect δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) of the Gaussian mechanism."""
    with mp.workdps(60):
        m = mp.mpf(mu)
        low, high = mp.mpf(0), m * m / 2 + 50 * m + 1
        for _ in range(200):
            e = (low + high) / 2
            found = mp.ncdf(m / 2 - e / m) - mp.e**e * mp.ncdf(-m / 2 - e / m)
            low, high = (e, high) if found > delta else (low, e)
        return float(high)


@pytest.mark.parametrize("delta", [1e-12, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 3.0, 10.0, 300.0])
def test_the_exact_value_is_that_of_sixty_digits(mu: float, delta: float) -> None:
    expected = in_sixty_digits(mu, delta)
    assert gaussian_epsilon(mu, delta) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@every_accountant
@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [
        (100.0, 10**4, 1e-10),
        (316.2277660168379, 10**5, 1e-10),
        (120.68, 131_072, 1e-10),
        (100.0, 10**6, 1e-12),
        (333.0, 10**6, 1e-9),
        (1000.0, 10**6, 1e-8),
        (3.0, 1, 1e-12),
        (0.3, 1, 1e-3),
    ],
)
def test_rounding_takes_no_accountant_below_the_exact_value(
    accountant: str, sigma: float, steps: int, delta: float
) -> None:
    """The composition of many steps rounds, and a δ near its rounding had too small an ε."""
    found = ACCOUNTANTS[accountant]([Segment(sigma, 1.0, steps)], delta)
    if found is not None:
        assert found >= in_sixty_digits(math.sqrt(steps) / sigma, delta)


@every_accountant
@given(mu=st.floats(0.05, 8.0), log_steps=st.floats(0, 17), log_delta=st.floats(-12, -1))
@settings(max_examples=25)
def test_no_accountant_is_below_the_exact_value(
    accountant: str, mu: float, log_steps: float, log_delta: float
) -> None:
    steps, delta = round(2**log_steps), 10**log_delta
    sigma = math.sqrt(steps) / mu
    found = ACCOUNTANTS[accountant]([Segment(sigma, 1.0, steps)], delta)
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    if found is not None:
        assert found >= exact * (1 - 1e-12)
        assert found <= {"prv": 1.01, "pld": 1.01, "rdp": 1.6}[accountant] * exact + 0.05


@pytest.mark.parametrize(
    ("steps", "delta", "answers"),
    [(10**4, 1e-10, True), (10**5, 1e-10, False), (2**20, 1e-8, True), (2**21, 1e-3, False)],
)
def test_pld_does_not_answer_where_its_rounding_is_not_small(
    steps: int, delta: float, answers: bool
) -> None:
    assert (pld_epsilon([Segment(300.0, 1.0, steps)], delta) is not None) is answers
