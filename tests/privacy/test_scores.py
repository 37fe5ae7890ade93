from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.scores import CURVATURES, BlockScores

A0 = "blocks.0.attn.qkv.lora_A.weight"
A0_MLP = "blocks.0.mlp.fc1.lora_A.weight"
B1 = "blocks.1.attn.qkv.lora_B.weight"
HEAD = "head.weight"
BLOCKS = {A0: 0, A0_MLP: 0, B1: 1}
RATES = {A0: 0.1, A0_MLP: 0.1, B1: 0.5, HEAD: 7.0}

seeds = st.integers(0, 2**32 - 1)
curvatures = st.sampled_from(CURVATURES)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def one_block(curvature: str, rate: float) -> BlockScores:
    return BlockScores({A0: 0}, 1, {A0: rate}, curvature)


def kappa(secant: BlockScores, flat: BlockScores, rate: float) -> float:
    """Return the curvature that a score contains, from the same score without curvature."""
    return (1 - secant.result()[0] / flat.result()[0]) * 2 / rate


def test_hand_computed_energies() -> None:
    scores = BlockScores(BLOCKS, 3, RATES)
    scores.observe(A0, tensor(3.0, 4.0), tensor(0.0, 0.0), 0.5)  # 25 - 2·0.5 = 24
    scores.observe(A0, tensor(0.0, 1.0), tensor(9.0, 9.0), 1.0)  # 1 - 2·1 = -1
    scores.observe(A0_MLP, tensor(2.0), tensor(0.0), 0.25)  # 3.75
    scores.observe(B1, tensor(1.0, 1.0, 1.0), tensor(0.0, 0.0, 0.0), 2.0)  # 3 - 6, negative
    scores.observe(HEAD, tensor(100.0), tensor(0.0), 0.0)
    expected = [0.1 * ((24 - 1) / 2 + 3.75), 0.5 * -3.0, 0.0]
    assert scores.result() == pytest.approx(expected, rel=1e-14)


def test_hand_computed_secants() -> None:
    scores = BlockScores(BLOCKS, 2, RATES, "secant")
    # Two arrays of one block: numerators 1·2 - 0.1·1·3 and 4·2 + (-1)·1 - 0.1·2·4.
    scores.observe(A0, tensor(5.0), tensor(1.0), 3.0)
    scores.observe(A0, tensor(6.0), tensor(3.0), 100.0)
    scores.observe(A0_MLP, tensor(1.0, 2.0), tensor(0.0, 0.0), 4.0)
    scores.observe(A0_MLP, tensor(5.0, 1.0), tensor(2.0, 1.0), 0.0)
    curvature = ((2 - 0.3) + (8 - 1 - 0.8)) / (4 + 5)
    energy = ((25 - 3) + (36 - 100)) / 2 + ((5 - 8) + 26) / 2
    # A path of three steps, the last of which rests: 3·2 then nothing; κ = 6/4.
    for grad, value in ((0.0, 0.0), (3.0, 2.0), (1.0, 2.0)):
        scores.observe(B1, tensor(grad), tensor(value), 0.0)
    expected = [
        0.1 * energy * (1 - 0.05 * curvature),
        0.5 * (0 + 9 + 1) / 3 * (1 - 0.25 * 6 / 4),
    ]
    assert scores.result() == pytest.approx(expected, rel=1e-14)


def test_both_factors_of_a_block_count_each_at_its_own_rate() -> None:
    a, b = A0, "blocks.0.attn.qkv.lora_B.weight"
    scores = BlockScores({a: 0, b: 0}, 1, {a: 0.1, b: 0.5}, "secant")
    for name in (a, b):
        scores.observe(name, tensor(2.0), tensor(0.0), 0.0)
        scores.observe(name, tensor(4.0), tensor(1.0), 0.0)
    # κ = (2 + 2)/(1 + 1) = 2, e = 10 for either.
    assert scores.result() == pytest.approx([1.0 * (1 - 0.1) + 5.0 * (1 - 0.5)])


def test_negative_curvature_counts_as_none() -> None:
    scores = one_block("secant", 0.5)
    scores.observe(A0, tensor(2.0), tensor(0.0), 0.0)
    scores.observe(A0, tensor(1.0), tensor(3.0), 0.0)
    assert scores.result() == pytest.approx([0.5 * 2.5])


@pytest.mark.parametrize("steps", [1, 4])
def test_no_curvature_without_two_steps_or_movement(steps: int) -> None:
    scores = one_block("secant", 0.5)
    for step in range(steps):
        scores.observe(A0, tensor(2.0 + step), tensor(1.0), 0.1)
    energies = [(2.0 + step) ** 2 - 0.1 for step in range(steps)]
    assert scores.result() == pytest.approx([0.5 * sum(energies) / steps])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_blocks_that_nothing_was_observed_for_score_zero(curvature: str) -> None:
    scores = BlockScores(BLOCKS, 4, RATES, curvature)
    assert scores.result() == [0.0] * 4
    scores.observe(HEAD, tensor(1.0), tensor(1.0), 0.0)
    scores.observe("blocks.0.other.lora_A.weight", tensor(1.0), tensor(1.0), 0.0)
    assert scores.result() == [0.0] * 4


def test_energy_is_unbiased_under_noise() -> None:
    grad, sigma, draws = normal(0, 4, 25), 0.5, 4000
    estimates = []
    for seed in range(draws):
        scores = one_block("none", 1.0)
        scores.observe(A0, grad + sigma * normal(seed + 1, 4, 25), grad, sigma**2)
        estimates += scores.result()
    truth = float(grad.square().sum())
    error = float(np.std(estimates)) / math.sqrt(draws)
    assert error < 0.01 * truth
    assert abs(float(np.mean(estimates)) - truth) < 4 * error


def test_pure_noise_cancels_between_clients_because_nothing_is_clamped() -> None:
    zero, estimates = torch.zeros(100, dtype=torch.float64), []
    for seed in range(2000):
        scores = one_block("none", 1.0)
        scores.observe(A0, normal(seed, 100), zero, 1.0)
        estimates += scores.result()
    error = math.sqrt(2 * 100 / 2000)
    assert abs(float(np.mean(estimates))) < 4 * error
    # What clamping each would leave, far outside the error: √(2·numel/2π).
    assert float(np.maximum(estimates, 0).mean()) > 15 * error


def descend(
    hessian: Tensor, start: Tensor, rate: float, sigma: float, steps: int, decay: float = 0.0
) -> tuple[float, float, float]:
    """Run noisy SGD on ½θᵀHθ from many starts at once.

    Returns the curvature of the score, that without the correction, and ⟨Δθ,HΔθ⟩/‖Δθ‖² of the path.
    """
    corrected, flat = one_block("secant", rate), one_block("none", rate)
    raw, exact, movement = 0.0, 0.0, 0.0
    theta, last = start.clone(), None
    for step in range(steps):
        grad = theta @ hessian + sigma * normal(1000 + step, *theta.shape)
        corrected.observe(A0, grad, theta, sigma**2)
        flat.observe(A0, grad, theta, sigma**2)
        if last is not None:
            moved = theta - last[1]
            raw += float(((grad - last[0]) * moved).sum())
            exact += float(((moved @ hessian) * moved).sum())
            movement += float((moved**2).sum())
        last = grad.clone(), theta.clone()
        theta -= rate * (grad + decay * theta)
    return kappa(corrected, flat, rate), raw / movement, exact / movement


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("eigenvalues", [(2.0, 2.0, 2.0, 2.0), (0.2, 1.0, 3.0, 6.0)])
def test_secant_is_unbiased_on_a_quadratic(eigenvalues: tuple[float, ...], decay: float) -> None:
    basis = torch.linalg.qr(normal(7, 4, 4))[0]
    hessian = basis @ torch.diag(tensor(*eigenvalues)) @ basis.t()
    start = 1 + normal(8, 20_000, 4)
    got, raw, exact = descend(hessian, start, rate=0.1, sigma=3.0, steps=6, decay=decay)
    assert got == pytest.approx(exact, rel=0.03)
    assert raw > 1.5 * exact


def test_secant_without_noise_is_the_curvature_exactly() -> None:
    hessian = 3.0 * torch.eye(4, dtype=torch.float64)
    got, raw, exact = descend(hessian, normal(0, 5, 4), rate=0.2, sigma=0.0, steps=4)
    assert got == pytest.approx(3.0, rel=1e-12)
    assert raw == pytest.approx(exact)


@given(curvatures, seeds)
def test_order_of_arrays_does_not_matter(curvature: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"blocks.{i}.lora_B.weight" for i in range(9)]
    blocks = {name: i % 2 for i, name in enumerate(names)}
    rates = {name: 1.0 + 0.1 * i for i, name in enumerate(names)}
    one, other = (
        BlockScores({n: blocks[n] for n in order}, 2, rates, curvature)
        for order in (names, list(rng.permutation(names)))
    )
    for step in range(4):
        values = {name: normal(seed + step + 9 * i, 3) for i, name in enumerate(names)}
        seen = {name: (3 * value**3 + value, value) for name, value in values.items()}
        for scores in (one, other):
            for name in rng.permutation(names):
                scores.observe(str(name), *seen[str(name)], 1e-3)
    assert one.result() == other.result()


@given(curvatures, seeds)
def test_only_released_gradients_values_and_constants_are_read(curvature: str, seed: int) -> None:
    results = []
    for client in range(2):
        torch.manual_seed(client)
        scores = BlockScores(BLOCKS, 2, RATES, curvature)
        for step in range(3):
            for i, name in enumerate(BLOCKS):
                value = nn.Parameter(normal(seed + 10 * step + i, 2, 3))
                grad = normal(seed + 50 + 10 * step + i, 2, 3)
                private = normal(client, 4, 2, 3) * 10**client
                value.grad = private[0]
                value.grad_sample = private  # type: ignore[attr-defined]
                value.summed_grad = private.sum(0)  # type: ignore[attr-defined]
                before = torch.random.get_rng_state()
                scores.observe(name, grad, value, 0.2)
                assert torch.equal(torch.random.get_rng_state(), before)
        results.append(scores.result())
    assert results[0] == results[1]


@given(curvatures, seeds)
def test_a_caller_may_overwrite_what_it_gave(curvature: str, seed: int) -> None:
    careful, careless = one_block(curvature, 0.3), one_block(curvature, 0.3)
    for step in range(4):
        grad, value = normal(seed + step, 3), normal(seed + 100 + step, 3)
        careful.observe(A0, grad, value, 0.1)
        given_grad, given_value = grad.clone(), nn.Parameter(value.clone())
        careless.observe(A0, given_grad, given_value, 0.1)
        assert torch.equal(given_grad, grad)
        assert torch.equal(given_value, value)
        with torch.no_grad():
            given_grad.fill_(math.nan)
            given_value.fill_(math.nan)
    assert careless.result() == careful.result()
    assert careful.result() == careful.result()


@pytest.mark.parametrize(("curvature", "copies"), [("none", 0), ("secant", 2)])
def test_memory_does_not_grow_with_steps(curvature: str, copies: int) -> None:
    def alive() -> int:
        return sum(type(o) is Tensor and o.shape == (17, 19) for o in gc.get_objects())

    before = alive()
    scores = BlockScores(BLOCKS, 2, RATES, curvature)
    for step in range(5):
        for name in (*BLOCKS, HEAD):
            value = nn.Parameter(normal(step + 1, 17, 19))
            scores.observe(name, normal(step, 17, 19), value, 0.1)
    del value
    assert alive() - before == copies * len(BLOCKS)
    held = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (17, 19)]
    assert not any(o.requires_grad for o in held)


def test_half_precision_is_summed_in_fp64() -> None:
    size, rate, scores = 3000, 1e-6, one_block("secant", 1e-6)
    # Neither difference fits fp16: one is beyond its range, one beyond its digits.
    for grad, value in ((60_000.0, 1.0), (-60_000.0, -(2.0**-12))):
        scores.observe(A0, torch.full((size,), grad).half(), torch.full((size,), value).half(), 1.0)
    moved = 1 + 2.0**-12
    curvature = (120_000 * moved - rate) / moved**2
    expected = rate * size * (60_000.0**2 - 1) * (1 - 0.5 * rate * curvature)
    assert scores.result() == pytest.approx([expected], rel=1e-12)


def test_sums_of_fp32_keep_what_the_noise_leaves() -> None:
    grad = normal(0, 1000, 100).float()
    scores = one_block("none", 1.0)
    variance = float(grad.double().square().mean()) * (1 - 1e-9)
    scores.observe(A0, grad, grad, variance)
    truth = math.fsum(float(g) ** 2 for g in grad.flatten()) - grad.numel() * variance
    assert scores.result()[0] == pytest.approx(truth, rel=1e-4)


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'secant'") as caught:
        BlockScores(BLOCKS, 2, RATES, "secants")
    assert caught.value.key == "curvature"
    for block in (-1, 2):
        with pytest.raises(InvalidValue, match="0 to 1"):
            BlockScores({A0: block}, 2, RATES)
    with pytest.raises(KeyError, match="lora_A"):
        BlockScores(BLOCKS, 2, {B1: 0.1})
