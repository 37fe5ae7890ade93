from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal  # type: ignore[import-untyped]
from torch import Tensor

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.postprocessing.filters import FILTERS, make_filter

Array = npt.NDArray[np.floating[Any]]

A = "blocks.0.attn.qkv.lora_A.weight"
B = "blocks.0.attn.qkv.lora_B.weight"
HEAD = "head.weight"
SPATIAL = ("binomial", "laplacian")
TEMPORAL = {"ema": ([0.1, 0.0], [1.0, -0.9]), "doppler": ([0.05, 0.05], [1.0, -0.9])}

filters = st.sampled_from(FILTERS)
spatial = st.sampled_from(SPATIAL)
temporal = st.sampled_from(sorted(TEMPORAL))
names = st.sampled_from((A, B, HEAD))
factors = st.sampled_from((A, B))
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def law(*draws: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda test: settings(deadline=None)(given(*draws)(test))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def matrix(name: str, size: int) -> Array:
    """Return a spatial filter's matrix, made without the code under test."""
    eye = np.eye(size)
    if name == "laplacian":
        return np.linalg.inv(3 * eye - np.roll(eye, 1, axis=0) - np.roll(eye, -1, axis=0))
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.pad(eye, ((0, 0), (2, 2)), mode="symmetric")
    return np.stack([np.convolve(row, kernel, mode="valid") for row in padded], axis=1)


def lfilter(name: str, steps: Array) -> Array:
    """Filter along the first axis with SciPy, over what it makes of a constant 1."""
    b, a = TEMPORAL[name]
    ones = np.ones((len(steps), *[1] * (steps.ndim - 1)))
    filtered: Array = signal.lfilter(b, a, steps, axis=0) / signal.lfilter(b, a, ones, axis=0)
    return filtered


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@law(filters, names, sizes, sizes, st.floats(-1e3, 1e3))
def test_constants_pass_from_the_first_step_on(
    which: str, name: str, rows: int, columns: int, value: float
) -> None:
    apply = make_filter(which)
    constant = torch.full((rows, columns), value, dtype=torch.float64)
    for _ in range(12):
        assert_close(apply(name, constant), constant)


@law(spatial, factors, sizes, sizes, seeds)
def test_spatial_filters_keep_the_sum_of_each_rank(
    which: str, name: str, rows: int, columns: int, seed: int
) -> None:
    grad = normal(seed, rows, columns)
    axis = 1 if name == A else 0
    assert_close(make_filter(which)(name, grad).sum(axis), grad.sum(axis))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [A, B, HEAD])
@pytest.mark.parametrize("which", FILTERS)
def test_shape_dtype_and_layout_are_kept_and_the_input_is_untouched(
    which: str, name: str, dtype: torch.dtype
) -> None:
    apply = make_filter(which)
    for step in range(3):
        grad = normal(step, 5, 7).to(dtype)
        before, version = grad.clone(), grad._version
        filtered = apply(name, grad)
        assert (filtered.shape, filtered.dtype) == (grad.shape, dtype)
        assert filtered.device == grad.device
        assert filtered.is_contiguous()
        assert grad._version == version
        assert torch.equal(grad, before)
        assert 0.0 < apply.noise_gain(name) <= 1.0 + 1e-12


@pytest.mark.parametrize("which", FILTERS)
def test_half_precision_is_rounded_once(which: str) -> None:
    exact, rounded = make_filter(which), make_filter(which)
    for step in range(20):
        grad = normal(step, 4, 33).to(torch.bfloat16)
        expected = exact(A, grad.double())
        torch.testing.assert_close(rounded(A, grad).double(), expected, rtol=2**-8, atol=1e-5)


@law(spatial, sizes, st.integers(1, 6), seeds)
def test_spatial_filters_equal_a_dense_matrix_on_the_long_side(
    which: str, size: int, rank: int, seed: int
) -> None:
    apply, dense = make_filter(which), matrix(which, size)
    grad = normal(seed, rank, size)
    expected = torch.from_numpy(grad.numpy() @ dense.T)
    assert_close(apply(A, grad), expected)
    assert_close(apply(B, grad.T.contiguous()), expected.T)
    gain = pytest.approx((dense**2).sum() / size, rel=1e-12)
    assert apply.noise_gain(A) == apply.noise_gain(B) == gain


@law(spatial, factors, st.integers(2, 6), sizes, seeds)
def test_ranks_are_never_mixed(which: str, name: str, rank: int, size: int, seed: int) -> None:
    grad = normal(seed, rank, size)
    changed, row = grad.clone(), seed % rank
    changed[row] = 1e6 * normal(seed + 1, size)
    if name == B:
        grad, changed = grad.T.contiguous(), changed.T.contiguous()
    before, after = make_filter(which)(name, grad), make_filter(which)(name, changed)
    if name == B:
        before, after = before.T, after.T
    others = torch.arange(rank) != row
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[row], after[row])


@law(st.integers(1, 255), st.floats(0, math.tau))
def test_binomial_response_is_cos_to_the_fourth(cycles: int, phase: float) -> None:
    size = 512
    omega = math.tau * cycles / size
    wave = torch.cos(omega * torch.arange(size, dtype=torch.float64) + phase)[None]
    filtered = make_filter("binomial")(A, wave)
    inside = slice(2, -2)
    assert_close(filtered[:, inside], math.cos(omega / 2) ** 4 * wave[:, inside])


@law(st.integers(0, 256), st.floats(0, math.tau))
def test_laplacian_response_is_that_of_an_implicit_heat_step(cycles: int, phase: float) -> None:
    size = 512
    omega = math.tau * cycles / size
    wave = torch.cos(omega * torch.arange(size, dtype=torch.float64) + phase)[None]
    filtered = make_filter("laplacian")(A, wave)
    assert_close(filtered, wave / (1 + 4 * math.sin(omega / 2) ** 2))


@pytest.mark.parametrize("name", [A, B])
@pytest.mark.parametrize(("which", "gain"), [("binomial", 70 / 256), ("laplacian", 3 / 5**1.5)])
def test_spatial_power_on_white_noise(which: str, gain: float, name: str) -> None:
    apply = make_filter(which)
    noise = normal(3, 200, 1000) if name == A else normal(3, 1000, 200)
    # The effective number of independent coordinates is some 100 000: standard error 0.5 %.
    assert float(apply(name, noise).var()) == pytest.approx(gain, rel=0.025)
    assert apply.noise_gain(name) == pytest.approx(gain, rel=2e-3)


@law(temporal, names, st.integers(1, 30), seeds)
def test_temporal_filters_equal_scipy(which: str, name: str, steps: int, seed: int) -> None:
    apply = make_filter(which)
    grads = normal(seed, steps, 3, 4)
    filtered = torch.stack([apply(name, grad) for grad in grads])
    assert_close(filtered, torch.from_numpy(lfilter(which, grads.numpy())))
    # Row t of the filter's matrix holds the weights of steps 1 to t in output t.
    weights = lfilter(which, np.eye(steps))[-1]
    assert apply.noise_gain(name) == pytest.approx(float((weights**2).sum()), rel=1e-12)


@pytest.mark.parametrize(("which", "limit"), [("ema", 1 / 19), ("doppler", 0.05)])
def test_temporal_gain_falls_from_one_to_its_limit(which: str, limit: float) -> None:
    apply = make_filter(which)
    gains = []
    for step in range(200):
        filtered = apply(HEAD, normal(step, 20_000))
        gains.append(apply.noise_gain(HEAD))
    assert gains[0] == pytest.approx(1.0, rel=1e-12)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == pytest.approx(limit, rel=1e-6)
    assert float(filtered.var()) == pytest.approx(limit, rel=0.05)


@law(filters, st.lists(names, min_size=1, max_size=20), seeds)
def test_state_is_kept_by_array_and_by_filter(which: str, order: list[str], seed: int) -> None:
    shared = make_filter(which)
    alone = {name: make_filter(which) for name in (A, B, HEAD)}
    for step, name in enumerate(order):
        grad = normal(seed + step, 4, 4)
        assert torch.equal(shared(name, grad), alone[name](name, grad))
        for seen in set(order[: step + 1]):
            assert shared.noise_gain(seen) == alone[seen].noise_gain(seen)


@law(temporal, seeds)
def test_a_caller_may_overwrite_what_it_gave_and_what_it_got(which: str, seed: int) -> None:
    careful, careless = make_filter(which), make_filter(which)
    for step in range(4):
        grad = normal(seed + step, 3, 4)
        expected, copy = careful(A, grad), grad.clone()
        got = careless(A, copy)
        assert torch.equal(got, expected)
        copy.fill_(math.nan)
        got.fill_(math.nan)


@law(filters, names, st.floats(-10, 10), seeds)
def test_filters_are_linear(which: str, name: str, scale: float, seed: int) -> None:
    of_x, of_y, of_sum = (make_filter(which) for _ in range(3))
    for step in range(5):
        x, y = normal(seed + step, 2, 6, 9)
        assert_close(of_sum(name, x + scale * y), of_x(name, x) + scale * of_y(name, y))


@law(st.sampled_from(("none", *SPATIAL)), seeds)
def test_nothing_is_filtered_without_a_filter_and_in_a_head_without_order(
    which: str, seed: int
) -> None:
    apply, grad = make_filter(which), normal(seed, 5)
    assert torch.equal(apply(HEAD, grad), grad)
    assert apply.noise_gain(HEAD) == 1.0


@pytest.mark.parametrize("which", [*SPATIAL, *TEMPORAL])
def test_gain_of_an_array_that_was_not_filtered_is_refused(which: str) -> None:
    apply = make_filter(which)
    apply(B, normal(0, 4, 4))
    with pytest.raises(KeyError, match="lora_A"):
        apply.noise_gain(A)


def test_unknown_filter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'binomial'") as caught:
        make_filter("binomal")
    assert caught.value.key == "filter"
    assert all(repr(name) in caught.value.allowed for name in FILTERS)
