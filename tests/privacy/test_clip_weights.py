"""Weighted parts under one joint clip: exact, of sensitivity C, and at no cost in privacy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import part_of
from fedlora_flwr.plan import PARTS
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings
from fedlora_flwr.secure_sum.rounding import rounded
from tests.models import FAMILIES, PLAIN_SGD, VIT, active, engine_of, loop_gradients, update

WEIGHTS = {"A": 3.0, "B": 0.5, "head": 0.125}
UNEVEN = ClipWeights(a=3.0, b=0.5, head=0.125)
JOINED = [0, 2, 3, 4]
floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
weights = st.floats(1e-3, 1e3)


def by_hand(family: Any, mode: str, clip_norm: float) -> dict[str, Tensor]:
    """Return the sum of W⁻¹ clip(W g) over records, from plain PEFT and one record at a time."""
    gradients = loop_gradients(family, family.plain(), family.records(6), JOINED)
    names = active(family.adapted(), mode)
    total = {name: torch.zeros_like(gradients[name][0]) for name in names}
    for record in range(len(JOINED)):
        weighted = {n: WEIGHTS[part_of(n)] * gradients[n][record] for n in names}
        norm = math.sqrt(sum(float(g.square().sum()) for g in weighted.values()))
        factor = min(1.0, clip_norm / norm)
        for name, gradient in weighted.items():
            total[name] += factor * gradient / WEIGHTS[part_of(name)]
    return total


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("mode", ["A", "B", "*"])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_step_is_the_weighted_clip_worked_out_by_hand(
    family: Any, mode: str, microbatch: int | None
) -> None:
    expected = by_hand(family, mode, 0.7)
    mechanism = Mechanism(0.0, 0.7, 4, 6, weights=UNEVEN)

    moved = update(
        engine_of(family, microbatch=microbatch), family.records(6), JOINED, mode, mechanism
    )

    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_noise_of_a_part_is_divided_by_its_weight() -> None:
    """An empty batch releases noise alone, and the draws are those of the same seed."""
    even, uneven = (
        update(engine_of(VIT), VIT.records(4), [], "*", Mechanism(2.0, 0.5, 2, 4, weights=w), 3)
        for w in (EVEN, UNEVEN)
    )
    for name, drawn in even.items():
        assert drawn.any()
        torch.testing.assert_close(uneven[name] * WEIGHTS[part_of(name)], drawn)
    mechanism = Mechanism(2.0, 0.5, 2, 4, weights=UNEVEN)
    head = float(torch.cat([x.flatten() for n, x in uneven.items() if part_of(n) == "head"]).std())
    stated = 2 * math.sqrt(mechanism.noise_variance_of("head.weight"))  # b = 2 times the mean.
    assert head == pytest.approx(stated, rel=0.5)
    assert stated == pytest.approx(2.0 * 0.5 / 0.125)


@given(
    st.lists(floats, min_size=1, max_size=20),
    st.lists(floats, min_size=1, max_size=20),
    weights,
    weights,
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_a_record_moves_the_noisy_sum_by_c_at_most_under_any_weights(
    first: list[float], second: list[float], one: float, two: float, clip_norm: float
) -> None:
    parameters = [nn.Parameter(torch.zeros(len(values))) for values in (first, second)]
    made = NoisyOptimizer(
        torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=1,
        source=SeededNoise(0),
        weights=(one, two),
    )
    for parameter, values in zip(parameters, (first, second), strict=True):
        parameter.grad_sample = torch.tensor([values])  # type: ignore[attr-defined]
    whole = rounded(made.rows(), clip_norm, 1024)
    made.clip_and_accumulate()

    assert made.summed is not None
    assert float(made.summed.double().norm()) <= 1
    assert float(whole.double().norm()) <= 1024


def test_only_ratios_matter_where_the_clip_norm_follows() -> None:
    found = [
        update(engine_of(VIT), VIT.records(6), JOINED, "*", Mechanism(1.0, c, 4, 6, weights=w))
        for c, w in ((0.5, EVEN), (2.0, ClipWeights(4.0, 4.0, 4.0)))
    ]
    for name, moved in found[0].items():
        torch.testing.assert_close(found[1][name], moved, rtol=1e-9, atol=1e-12)


def test_where_nothing_is_clipped_the_signal_is_the_same_under_any_weights() -> None:
    """So AS-LoRA's scores, which read uploads, estimate the same decrease of the loss."""
    even, uneven = (
        update(engine_of(VIT), VIT.records(6), JOINED, "*", Mechanism(0.0, 1e6, 4, 6, weights=w))
        for w in (EVEN, UNEVEN)
    )
    for name, moved in even.items():
        torch.testing.assert_close(uneven[name], moved, rtol=1e-9, atol=1e-12)


def test_adam_takes_each_parts_own_noise_out_of_its_second_moment() -> None:
    engine = engine_of(VIT)
    settings = OptimizerSettings("adamw", lr_a=0.1, lr_b=0.1, lr_head=0.1)
    engine.start_round(Mechanism(2.0, 0.5, 4, 6, weights=UNEVEN), settings, SeededNoise(0))
    engine.step(VIT.records(6), torch.tensor(JOINED), active(engine.adapted, "*"))

    assert engine._optimizer is not None
    told = engine._optimizer.original_optimizer.noise_variance
    for name, parameter in engine.adapted.parameters.items():
        expected = (2.0 * 0.5 / 4 / WEIGHTS[part_of(name)]) ** 2
        assert told[parameter] == pytest.approx(expected, rel=1e-12)


def test_an_epsilon_buys_the_same_noise_under_any_weights() -> None:
    plain = RunConfig(epsilon=1.0, num_rounds=5)
    weighted = RunConfig(epsilon=1.0, num_rounds=5, clip_weight_head=0.1, clip_weight_a=3.0)
    found = calibrated_mechanism(weighted, 400)

    assert found.noise_multiplier == calibrated_mechanism(plain, 400).noise_multiplier
    assert found.weights == ClipWeights(a=3.0, head=0.1)


@pytest.mark.parametrize("weight", [0.0, -1.0, 9e-4, 1001.0, math.inf, math.nan])
@pytest.mark.parametrize("part", ["a", "b", "head"])
def test_a_weight_out_of_range_is_refused_by_name(part: str, weight: float) -> None:
    with pytest.raises(InvalidValue, match=rf"clip-weight-{part} = .*from 0\.001 to 1,000"):
        ClipWeights(**{part: weight})


def test_each_array_has_the_weight_of_its_part() -> None:
    assert [UNEVEN.of_part(part) for part in PARTS] == [3.0, 0.5, 0.125]
    names = ["fc.lora_A.weight", "fc.lora_B.weight", "head.bias"]
    assert np.allclose([UNEVEN.of(name) for name in names], [3.0, 0.5, 0.125])
    assert PLAIN_SGD.rates.keys() == {"A", "B", None}
