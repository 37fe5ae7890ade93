"""What the accounting must not get wrong: both directions, all planned steps, extreme settings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy import accountants
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.calibration import calibrated_mechanism

# --- both directions ---


def by_direction(segment: Segment, delta: float) -> dict[str, float]:
    """Return ε of each direction by dp-accounting."""
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        segment.noise_multiplier,
        value_discretization_interval=1e-4,
        sampling_prob=segment.sample_rate,
    ).self_compose(segment.steps)
    return {
        "remove": loss._pmf_remove.get_epsilon_for_delta(delta),
        "add": loss._pmf_add.get_epsilon_for_delta(delta),
    }


@pytest.mark.parametrize(
    ("segment", "delta"),
    [
        (Segment(1.0, 0.3, 20), 1e-3),
        (Segment(0.7, 0.05, 50), 1e-5),
        (Segment(2.0, 0.9, 8), 1e-5),
    ],
)
def test_prv_covers_each_direction(
    segment: Segment, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record zeroed against the record there, and the other way round, by another library."""
    expected = by_direction(segment, delta)
    assert expected["remove"] - expected["add"] > 0.05, "The directions differ here."
    directed = accountants._directed_epsilon
    for kept in ("remove", "add"):
        # The other direction is taken to cost nothing, so that this one decides.
        monkeypatch.setattr(
            accountants,
            "_directed_epsilon",
            lambda *a, kept=kept: directed(*a) if a[-1] == kept else 0.0,
        )
        found = accountants.prv_epsilon([segment], delta)
        assert found is not None
        assert found == pytest.approx(expected[kept], rel=0.01, abs=0.012)


# --- all planned steps ---


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("max_rounds", [0, 7])
def test_noise_is_for_all_rounds_that_a_client_may_join(share: float, max_rounds: int) -> None:
    """A server that takes half of the clients per round may take the same half each time."""
    config = RunConfig(
        epsilon=2.0, delta=1e-4, batch_size=32, local_steps=5, num_rounds=12,
        fraction_train=share, max_rounds=max_rounds,
    )  # fmt: skip
    steps = 5 * (max_rounds or 12)
    mechanism = calibrated_mechanism(config, 1000)
    assert mechanism.noise_multiplier == calibrate(2.0, 1e-4, 0.032, steps)
    spent = epsilon_spent([Segment(mechanism.noise_multiplier, 0.032, steps)], 1e-4).epsilon
    assert 1.98 <= spent <= 2.0


# --- extreme settings ---

EXTREMES = [
    "calibrate(3.0, 1e-5, 1.0, 10**9)",
    "calibrate(3.0, 1e-5, 1e-9, 10**9)",
    "calibrate(3.0, 1e-5, 1e-12, 1)",
    "calibrate(3.0, 1e-5, 1e-300, 1)",
    "calibrate(3.0, 1e-5, 0.5, 10**6)",
    "calibrate(3.0, 1e-5, 0.01, 10**9)",
    "calibrate(3.0, 1e-5, 0.1, 10**30)",
    "calibrate(3.0, 1e-5, 0.9999999, 1000)",
    "calibrate(3.0, 1e-300, 0.1, 100)",
    "calibrate(1e300, 1e-5, 1.0, 3)",
    "calibrate(1e-300, 1e-5, 1.0, 3)",
    "calibrate_run(3.0, 1e-5, 1e-9, 10**9, run_epsilon=1.0)",
    "calibrate_run(3.0, 1e-5, 1.0, 10**9, run_epsilon=1.0)",
    "calibrate_run(3.0, 1e-5, 0.5, 10**6, run_epsilon=3.0)",
    "choose_order(3.0, 1e-5, Segment(1e-300, 1e-300, 1))",
    "choose_order(3.0, 1e-5, Segment(1e300, 0.5, 1))",
    "epsilon_spent([Segment(1.0, 1.0, 10**9)], 1e-5).epsilon",
    "epsilon_spent([Segment(1.0, 1e-9, 10**9)], 1e-5).epsilon",
    "epsilon_spent([Segment(1.0, 1e-300, 10**9)], 1e-5).epsilon",
    "epsilon_spent([Segment(1e-200, 0.1, 10)], 1e-5).epsilon",
    "epsilon_spent([Segment(1e200, 0.1, 10**9)], 1e-5).epsilon",
    "epsilon_spent([Segment(1.0, 0.3, 1000)], 0.999999).epsilon",
    "epsilon_spent([Segment(1.0, 0.1, 1)] * 3, 1e-300).epsilon",
    "epsilon_spent([Segment(0.3, 1e-6, 10**6)], 1e-3, 'pld').epsilon",
    "epsilon_spent([Segment(0.3, 1e-6, 10**9)], 1e-3, 'pld').epsilon",
    "epsilon_spent([Segment(100.0, 1.0, 10**6)], 1e-12, 'pld').epsilon",
]
ASKED = """
import json, resource, sys
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy import loss_grid
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.lifetime import calibrate_run, choose_order

loss_grid.opacus_analysis()
for line in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        answer = float(eval(line))
    except InvalidValue as error:
        answer = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([line, answer, grown / 1024]), flush=True)
"""


def test_extreme_settings_are_answered_or_refused_and_take_little_memory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKED, *EXTREMES],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: list[list[Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line, *_ in answers] == EXTREMES
    for line, answer, megabytes in answers:
        assert megabytes < 500, line
        if isinstance(answer, str):
            assert answer.count("\n") == 0, line
            assert "expected" in answer, line
        else:
            assert answer >= 0, line


@pytest.mark.parametrize("rate", [1e-7, 1e-9, 1e-10, 1e-12, 1e-300])
def test_rounding_does_not_make_rare_steps_free(rate: float) -> None:
    """The divergence of one step vanishes in the rounding of the series, or falls below 0."""
    for order in (1.25, 1.5, 2.0, 5.5, 8.0, 32.0):
        # The first term of the series, which is below the whole.
        least = order / 2 * rate**2 * math.expm1(1 / 0.5**2) * (1 - 1e-6)
        assert accountants.step_divergence(0.5, rate, order) > least
    many = epsilon_spent([Segment(0.5, rate, 10**9)], 1e-5)
    assert many.epsilon >= epsilon_spent([Segment(0.5, rate, 1)], 1e-5).epsilon


@given(
    sigma=st.floats(51, 1e4), rate=st.floats(0.4901, 0.5099), order=st.floats(1.01, 63).map(float)
)
@settings(max_examples=25, deadline=None)
def test_a_line_between_whole_orders_bounds_the_divergence(
    sigma: float, rate: float, order: float
) -> None:
    found = accountants.step_divergence(sigma, rate, order)
    # With so much noise a step is nearly Gaussian: α·q²/(2σ²), from below.
    assert found >= 0.99 * order * rate**2 / (2 * sigma**2)
    assert found <= accountants.step_divergence(sigma, rate, float(math.ceil(order))) * 1.0001


def test_steps_beyond_counting_are_refused() -> None:
    Segment(1.0, 0.1, 10**9)
    with pytest.raises(InvalidValue, match="steps = 1000000001"):
        Segment(1.0, 0.1, 10**9 + 1)
