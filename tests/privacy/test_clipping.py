"""The clipped, noisy sum at clip norms and gradients of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.privacy.clipping import NoisyOptimizer, clip_factors, row_norms
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import PLAIN_SGD, VIT, active, engine_of

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
clip_norms = st.sampled_from([5e-324, 1.4e-45, 1e-30, 1e-3, 1.0, 17.0, 1e30, 1e300, 1.7e308])
CLIPS = [1.4e-45, 1e-20, 1.0, 1e20, 1e300]


def optimizer(rows: Tensor, clip_norm: float, sigma: float = 0.0) -> NoisyOptimizer:
    parameter = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
    made = NoisyOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=clip_norm,
        expected_batch_size=1,
        source=SeededNoise(0),
    )
    parameter.grad_sample = rows.clone()  # type: ignore[attr-defined]
    return made


def share(rows: Tensor, clip_norm: float) -> Tensor:
    """Return the clipped sum of the rows, in units of the clip norm."""
    made = optimizer(rows, clip_norm)
    made.clip_and_accumulate()
    assert made.summed is not None
    return made.summed


@given(st.lists(floats, min_size=1, max_size=40), clip_norms)
def test_a_record_adds_at_most_1_whatever_its_gradient_and_the_clip_norm(
    values: list[float], clip_norm: float
) -> None:
    found = share(torch.tensor([values]), clip_norm)

    assert found.isfinite().all()
    assert float(found.double().norm()) <= 1
    if not all(map(math.isfinite, values)):
        assert not found.any()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-44, 1e-25, 1e-3, 1.0, 1e12, 1e25, 1e37])
def test_a_long_record_adds_1_to_the_last_digits_at_any_size(
    kind: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(1, 200_000, generator=generator, dtype=torch.float64) * size).to(kind)
    assert rows.isfinite().all()

    norm = float(share(rows, 5e-324).double().norm())

    assert norm <= 1
    if kind == torch.float64 or 1e-40 < size < 1e30:
        assert norm >= 1 - 8 * torch.finfo(kind).eps
    elif size > 1:
        assert norm >= 1 - 1e-5  # The factor itself has few digits there.


def test_a_short_record_is_divided_by_the_clip_norm() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]])
    torch.testing.assert_close(share(rows, 10.0), torch.tensor([0.33, 0.36]))
    assert torch.equal(share(rows[1:2], 1.0), rows[1])
    assert torch.equal(share(rows, math.inf), rows.sum(0))


def test_norms_of_long_rows_are_right_to_the_last_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 590_000, generator=generator)
    expected = rows.double().norm(dim=1)

    torch.testing.assert_close(row_norms(rows), expected, rtol=1e-12, atol=0)
    # What fp32 makes of it would pass the slack of a few epsilons.
    gaps = (torch.linalg.vector_norm(rows, dim=1).double() / expected - 1).abs()
    assert gaps.max() > 4 * torch.finfo(torch.float32).eps


def test_no_factor_is_rounded_up_past_its_norm() -> None:
    norms = torch.logspace(30, 41, 20_000, dtype=torch.float64)
    factors = clip_factors(norms, 1e-300, torch.float32)
    # Above 1e38 the factor has few digits left.
    assert bool((factors.double() * norms <= 1 - 4e-7).all())


def test_factors_of_norms_that_are_no_numbers_are_zero() -> None:
    norms = torch.tensor([math.nan, math.inf, 0.0, 2.0], dtype=torch.float64)
    factors = clip_factors(norms, 1.0, torch.float32)
    assert factors.tolist() == [0.0, 0.0, 1.0, pytest.approx(0.5, rel=1e-6)]


@pytest.mark.parametrize("clip_norm", CLIPS)
def test_noise_has_deviation_sigma_before_the_clip_norm_comes_in(clip_norm: float) -> None:
    rows = torch.ones(2, 5000)
    drawn = optimizer(rows, clip_norm, 1.5)
    drawn.clip_and_accumulate()
    before = drawn.summed
    assert before is not None
    drawn.add_noise()
    assert drawn.summed is not None

    noise = drawn.summed - before
    assert float(noise.std()) == pytest.approx(1.5, rel=0.05)
    assert (noise != 0).all()


@pytest.mark.parametrize("clip_norm", CLIPS)
def test_what_is_released_is_no_more_than_the_noisy_sum_in_units_of_c(clip_norm: float) -> None:
    """A release follows from the noisy sum and C alone, also where it overflows."""
    engine, names = engine_of(VIT), list(engine_of(VIT).adapted.parameters)
    engine.verify(VIT.records(4))
    engine.start_round(Mechanism(1.0, clip_norm, 2, 4), PLAIN_SGD, SeededNoise(3))
    start = {name: p.detach().clone() for name, p in engine.adapted.parameters.items()}
    engine.step(VIT.records(4), torch.arange(0), names)

    draws = SeededNoise(3).normal_like(torch.zeros(sum(p.numel() for p in start.values())).double())
    first = start[names[0]]
    expected = first - (draws[: first.numel()] * clip_norm / 2).view_as(first)
    torch.testing.assert_close(
        engine.adapted.parameters[names[0]].detach(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_record_with_one_broken_entry_counts_as_zero_as_a_whole(value: float) -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    broken = rows.clone()
    broken[1, 7] = value

    assert torch.equal(share(broken, 0.5), share(rows[[0, 2]], 0.5))


def test_gradients_in_half_precision_are_clipped_and_summed_in_fp32() -> None:
    rows = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = share(rows, 0.1)
    assert found.dtype == torch.float32
    for row in torch.split(rows, 1):
        assert 1 - 1e-6 <= float(share(row, 0.1).double().norm()) <= 1


class Steep(nn.Module):
    """The gradient of a record is what its picture says, times 1e30."""

    def __init__(self) -> None:
        super().__init__()
        self.adapted = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.adapted(x)
        return out


def test_a_huge_finite_gradient_moves_the_sum_by_the_clip_norm() -> None:
    def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["x"])
        return scores.sum(1) * 1e30

    adapted = attach(Steep(), LoRASpec(2, 4.0, 0.0, "adapted"), seed=0)
    records = TensorRecords({"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))})
    engine = PrivateEngine(adapted, losses)
    engine.verify(records)
    engine.start_round(Mechanism(0.0, 0.5, 1, 3), PLAIN_SGD, SeededNoise(0))
    start = {name: p.detach().clone() for name, p in adapted.parameters.items()}
    engine.step(records, torch.tensor([1]), active(adapted, "*"))

    moved = torch.cat([(start[n] - p.detach()).flatten() for n, p in adapted.parameters.items()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-6)
    assert {factor_of(name) for name in start} == {"A", "B"}


@pytest.mark.parametrize("sigma", [1e-4, 1e-45, 1e7, 1e300, math.inf, math.nan, -1.0])
def test_noise_that_fp32_cannot_carry_is_refused(sigma: float) -> None:
    with pytest.raises(InvalidValue, match="noise multiplier"):
        Mechanism(sigma, 1.0, 2, 4)


@pytest.mark.parametrize("clip_norm", CLIPS)
def test_the_variance_of_the_noise_is_stated_for_any_clip_norm(clip_norm: float) -> None:
    assert Mechanism(2.0, clip_norm, 4, 8).noise_variance == (0.5 * clip_norm) * (0.5 * clip_norm)
