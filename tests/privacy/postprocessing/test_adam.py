from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.postprocessing.adam import NoiseAwareAdamW

Array = npt.NDArray[np.float64]

betas = st.floats(0, 0.9999)
seeds = st.integers(0, 2**32 - 1)


def parameter(values: Array | list[float], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(np.asarray(values), dtype=dtype))


def weights(beta: float, steps: int) -> Array:
    raw = beta ** np.arange(steps - 1, -1, -1.0)
    normalized: Array = raw / raw.sum()
    return normalized


def expected_step(grads: Array, variances: Array, beta1: float, beta2: float, eps: float) -> Array:
    """Return what the last step subtracts at learning rate 1, from explicit weighted sums."""
    w = weights(beta2, len(grads))
    phi = w @ variances
    floor = phi * math.sqrt(2 * (w**2).sum())
    signal = np.maximum(w @ grads**2 - phi, floor)
    step: Array = (weights(beta1, len(grads)) @ grads) / (np.sqrt(signal) + eps)
    return step


def take(optimizer: torch.optim.Optimizer, p: nn.Parameter, grad: Array | Tensor) -> Array:
    """Take one step on ``p`` and return by how much it moved."""
    before = p.detach().clone()
    p.grad = torch.as_tensor(grad).to(p)
    optimizer.step()
    moved: Array = (p.detach() - before).double().numpy()
    return moved


@given(seeds, betas, betas, st.floats(1e-12, 1e-2), st.floats(0, 0.5))
def test_without_noise_it_is_adamw(
    seed: int, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    rng = np.random.default_rng(seed)
    starts = [rng.standard_normal(shape) for shape in ((3, 4), (5,), (2, 2))]
    ours, theirs = ([parameter(start) for start in starts] for _ in range(2))
    settings: dict[str, Any] = {"betas": (beta1, beta2), "eps": eps, "weight_decay": decay}

    def groups(ps: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "weight_decay": 0.02}]

    optimizers = (
        NoiseAwareAdamW(groups(ours), lr=0.01, **settings),
        torch.optim.AdamW(groups(theirs), lr=0.01, foreach=False, **settings),
    )
    for step in range(40):
        for i, start in enumerate(starts):
            grad = torch.from_numpy(rng.standard_normal(start.shape))
            for p in (ours[i], theirs[i]):
                # One array rests at every third step, another starts late.
                p.grad = None if (i == 0 and step % 3 == 0) or (i == 1 and step < 7) else grad
        for optimizer in optimizers:
            optimizer.step()
        for mine, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


def test_many_steps_without_noise_stay_adamw() -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal((6, 3))
    mine, reference = parameter(start), parameter(start)
    ours = NoiseAwareAdamW([mine], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1)
    for _ in range(2000):
        grad = rng.standard_normal(start.shape)
        take(ours, mine, grad)
        take(theirs, reference, grad)
    torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@given(seeds, betas, betas, st.floats(0, 0.1), st.integers(1, 12))
def test_varying_noise_variances_are_taken_out_exactly(
    seed: int, beta1: float, beta2: float, eps: float, steps: int
) -> None:
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((steps, 8)) * rng.uniform(0.1, 3, 8)
    variances = rng.uniform(0, 2, steps) * (rng.random(steps) < 0.8)
    p = parameter(np.zeros(8))
    optimizer = NoiseAwareAdamW([p], lr=0.7, betas=(beta1, beta2), eps=eps)
    for t in range(steps):
        optimizer.noise_variance = {p: float(variances[t])}
        moved = take(optimizer, p, grads[t])
        expected = -0.7 * expected_step(grads[: t + 1], variances[: t + 1], beta1, beta2, eps)
        np.testing.assert_allclose(moved, expected, rtol=1e-8, atol=1e-10)


def test_first_step_by_hand() -> None:
    p = parameter([0.0, 0.0, 0.0])
    optimizer = NoiseAwareAdamW([p], lr=1.0, eps=0.5)
    optimizer.noise_variance[p] = 2.0
    # Squares less the noise: 7, -1.75, 0.25; the last two are below the floor of √2·2.
    moved = take(optimizer, p, np.array([3.0, -0.5, 1.5]))
    floor = math.sqrt(2 * math.sqrt(2)) + 0.5
    np.testing.assert_allclose(moved, [-3 / (math.sqrt(7) + 0.5), 0.5 / floor, -1.5 / floor])


@pytest.mark.parametrize(("beta", "steps"), [(0.0, 3), (0.9, 1), (0.9, 5), (0.9, 60), (0.999, 10)])
def test_floor_is_the_standard_error_under_pure_noise(beta: float, steps: int) -> None:
    rng, count, variance = np.random.default_rng(1), 200_000, 0.3
    noise = rng.standard_normal((steps, count)) * math.sqrt(variance)
    second_moment = weights(beta, steps) @ noise**2
    p = parameter([0.0])
    optimizer = NoiseAwareAdamW([p], lr=1.0, betas=(0.0, beta), eps=0.0)
    optimizer.noise_variance[p] = variance
    for _ in range(steps):
        moved = take(optimizer, p, np.array([1e-30]))
    floor = (1e-30 / float(moved[0])) ** 2
    assert floor == pytest.approx(float(second_moment.std()), rel=0.02)


def test_signal_under_noise_gets_the_denominator_that_it_has_without() -> None:
    rng, count, signal, variance = np.random.default_rng(2), 20_000, 1.0, 4.0
    p = parameter(np.zeros(count))
    aware = NoiseAwareAdamW([p], lr=1.0, betas=(0.0, 0.99))
    aware.noise_variance[p] = variance
    for _ in range(700):
        grad = signal + rng.standard_normal(count) * math.sqrt(variance)
        moved = take(aware, p, grad)
    # One coordinate's estimate is noisy; their mean is that of the gradient alone.
    assert float(((grad / moved) ** 2).mean()) == pytest.approx(signal, rel=0.05)


def test_missing_variance_counts_as_none_and_each_parameter_has_its_own() -> None:
    noisy, clean = parameter([0.0]), parameter([0.0])
    optimizer = NoiseAwareAdamW([noisy, clean], lr=1.0, eps=0.0)
    optimizer.noise_variance = {noisy: 3.0, parameter([0.0]): 100.0}
    noisy.grad, clean.grad = torch.full((1,), 4.0).double(), torch.full((1,), 4.0).double()
    optimizer.step()
    assert clean.item() == pytest.approx(-1.0)
    assert noisy.item() == pytest.approx(-4 / math.sqrt(13))


def test_a_parameter_without_gradient_is_not_touched() -> None:
    moving, resting = parameter([1.0, 2.0]), parameter([3.0, 4.0])
    optimizer = NoiseAwareAdamW([moving, resting], lr=0.1, weight_decay=0.5)
    optimizer.noise_variance = {moving: 1.0, resting: 1.0}
    for _ in range(3):
        take(optimizer, moving, np.ones(2))
    assert resting._version == 0
    assert resting.tolist() == [3.0, 4.0]
    assert resting not in optimizer.state
    # It later starts with a first step of its own.
    optimizer.noise_variance = {resting: 0.0}
    moving.grad = None
    version = moving._version
    moved = take(optimizer, resting, np.full(2, 5.0))
    np.testing.assert_allclose(moved, [-0.1 - 0.15, -0.1 - 0.2], rtol=1e-6)
    assert moving._version == version


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"lr": 0.0}])
def test_parameters_move_in_place_and_the_state_is_wide(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    p = parameter(np.linspace(-1, 1, 6), dtype)
    reference = parameter(p.detach().double().numpy())
    optimizer = NoiseAwareAdamW([p], **settings)
    exact = NoiseAwareAdamW([reference], **settings)
    for step in range(5):
        address, version = p.data_ptr(), p._version
        grad = torch.linspace(-1e-3, 2e-3, 6).to(dtype) * (step + 1)
        kept, untouched = grad.clone(), grad._version
        optimizer.noise_variance[p] = exact.noise_variance[reference] = 1e-7
        p.grad = grad
        optimizer.step()
        take(exact, reference, kept.double())
        assert p.data_ptr() == address
        assert p._version > version
        assert p.dtype == dtype
        assert grad._version == untouched
        assert torch.equal(grad, kept)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [v for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    assert len(tensors) == 2
    for mine, theirs in zip(tensors, exact.state[reference].values(), strict=False):
        assert mine.dtype == wide
        assert mine.shape == p.shape
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-12)
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.double(), reference, rtol=tolerance, atol=tolerance)


def test_closure_runs_with_gradients_and_its_loss_comes_back() -> None:
    p = parameter([2.0])
    optimizer = NoiseAwareAdamW([p], lr=0.5, eps=0.0)

    def closure() -> float:
        loss = (p**2).sum()
        p.grad = torch.autograd.grad(loss, p)[0]
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert p.item() == pytest.approx(1.5)
    assert optimizer.step() is None


@pytest.mark.parametrize("noise_multiplier", [0.0, 2.0])
def test_opacus_wraps_it(noise_multiplier: float) -> None:
    from opacus.optimizers import DPOptimizer

    p, frozen = parameter(np.zeros(1000)), parameter([1.0])
    frozen.requires_grad_(False)
    groups: list[dict[str, Any]] = [{"params": [p], "lr": 1.0}, {"params": [frozen]}]
    inner = NoiseAwareAdamW(groups, eps=0.0)
    records = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 1000)))
    wrapped = DPOptimizer(
        inner,
        noise_multiplier=noise_multiplier,
        max_grad_norm=5.0,
        expected_batch_size=2,
        generator=torch.Generator().manual_seed(0),
    )
    p.grad_sample = records  # type: ignore[attr-defined]
    variance = (noise_multiplier * 5.0 / 2) ** 2
    inner.noise_variance[p] = variance
    wrapped.step()
    assert p.grad is not None
    grad = p.grad.numpy()
    expected = expected_step(grad[None], np.array([variance]), 0.9, 0.999, 0.0)
    np.testing.assert_allclose(p.detach().numpy(), -expected, rtol=1e-9)
    # The private gradient holds the noise that the optimizer was told of.
    clipped = (records * (5 / records.norm(dim=1, keepdim=True))).sum(0) / 2
    assert float((p.grad - clipped).var()) == pytest.approx(variance, rel=0.15, abs=1e-9)
    assert wrapped.state is inner.state
    assert wrapped.param_groups is inner.param_groups
    assert wrapped.defaults["betas"] == (0.9, 0.999)
    assert frozen.tolist() == [1.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("eps", -1e-9),
        ("weight_decay", -0.1),
        ("lr", math.nan),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    settings: dict[str, Any] = {key: value}
    with pytest.raises(InvalidValue) as caught:
        NoiseAwareAdamW([parameter([1.0])], **settings)
    assert caught.value.key == key
