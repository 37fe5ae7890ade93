from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.privacy.postprocessing.precondition import precondition

Array = npt.NDArray[np.float64]

factors = st.sampled_from(("A", "B"))
ranks = st.integers(1, 6)
extras = st.integers(0, 30)
scalings = st.floats(0.05, 20)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def gradients(weight_grad: Array, a: Array, b: Array, scaling: float) -> dict[str, Tensor]:
    """Return the gradients of A and B for a weight's gradient, by automatic differentiation."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    loss = (torch.from_numpy(weight_grad) * (scaling * leaves[1] @ leaves[0])).sum()
    return dict(zip("AB", torch.autograd.grad(loss, leaves), strict=True))


def least_squares(
    factor: str, weight_grad: Array, a: Array, b: Array, scaling: float, ridge: float
) -> Array:
    """Return the move of one factor that brings the weight nearest to its gradient."""
    design, target = (a.T, weight_grad.T) if factor == "B" else (b, weight_grad)
    rank = design.shape[1]
    augmented = np.vstack([scaling * design, scaling * math.sqrt(ridge) * np.eye(rank)])
    wanted = np.vstack([target, np.zeros((rank, target.shape[1]))])
    solution = np.linalg.lstsq(augmented, wanted, rcond=None)[0].astype(np.float64)
    return solution.T if factor == "B" else solution


@given(factors, ranks, extras, extras, scalings, st.sampled_from((0.0, 1e-3, 1.0)), seeds)
def test_step_is_the_least_squares_projection_of_the_full_gradient(
    factor: str, rank: int, more_m: int, more_n: int, scaling: float, ridge: float, seed: int
) -> None:
    m, n = rank + 2 + more_m, rank + 2 + more_n
    weight_grad, a, b = draw(seed, m, n), draw(seed + 1, rank, n), draw(seed + 2, m, rank)
    other = torch.from_numpy(a if factor == "B" else b)
    grad = gradients(weight_grad, a, b, scaling)[factor]
    got = precondition(grad, other, factor, scaling, ridge)
    expected = least_squares(factor, weight_grad, a, b, scaling, ridge)
    size = float(np.abs(expected).max())
    # Solving by the Gram matrix squares the condition number.
    condition = float(np.linalg.cond(other.numpy())) ** 2
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13 * condition * size + 1e-13)


def test_by_hand() -> None:
    a = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    grad = torch.tensor([[8.0, 3.0]])
    assert precondition(grad, a, "B", 2.0, 0.0).tolist() == [[0.5, 0.75]]
    torch.testing.assert_close(precondition(grad, a, "B", 1.0, 1.0), torch.tensor([[8 / 5, 3 / 2]]))
    torch.testing.assert_close(
        precondition(grad.t(), a.t(), "A", 0.5, 2.0), torch.tensor([[4 * 8 / 6], [4 * 3 / 3]])
    )


@given(factors, ranks, seeds)
def test_preconditioned_steps_move_the_weight_alike_in_every_basis(
    factor: str, rank: int, seed: int
) -> None:
    m, n, scaling = rank + 5, rank + 7, 2.0
    weight_grad, a, b = draw(seed, m, n), draw(seed + 1, rank, n), draw(seed + 2, m, rank)
    mix = np.linalg.qr(draw(seed + 3, rank, rank))[0] @ np.diag(np.linspace(0.5, 2, rank))
    moves = []
    for a_, b_ in ((a, b), (np.linalg.inv(mix) @ a, b @ mix)):
        grad = gradients(weight_grad, a_, b_, scaling)[factor]
        other = torch.from_numpy(a_ if factor == "B" else b_)
        step = precondition(grad, other, factor, scaling, 0.0).numpy()
        moves.append(step @ a_ if factor == "B" else b_ @ step)
    condition = float(np.linalg.cond(a if factor == "B" else b)) ** 2
    np.testing.assert_allclose(moves[0], moves[1], rtol=0, atol=1e-11 * condition)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_shape_type_and_layout_are_kept_and_inputs_are_untouched(
    factor: str, dtype: torch.dtype
) -> None:
    grad = torch.from_numpy(draw(0, 3, 9) if factor == "A" else draw(0, 9, 3)).to(dtype)
    other = torch.from_numpy(draw(1, 7, 3) if factor == "A" else draw(1, 3, 7)).to(dtype)
    other.requires_grad_()
    kept = grad.clone(), other.detach().clone()
    versions = grad._version, other._version
    got = precondition(grad, other, factor, 0.7, 0.01)
    assert (got.shape, got.dtype) == (grad.shape, dtype)
    assert got.is_contiguous()
    assert not got.requires_grad
    assert (grad._version, other._version) == versions
    assert torch.equal(grad, kept[0])
    assert torch.equal(other, kept[1])
    # Half precision is computed in fp32 and rounded once.
    exact = precondition(grad.double(), other.double(), factor, 0.7, 0.01)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps + 1e-5, atol=1e-6)


def test_fp64_factor_keeps_its_digits_under_an_fp32_gradient() -> None:
    # In fp32 this Gram matrix is singular.
    other = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-5]], dtype=torch.float64)
    got = precondition(torch.eye(2), other, "B", 1.0, 0.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.linalg.inv(other @ other.t()), rtol=1e-4, atol=0)


def test_fp32_factor_keeps_its_digits_under_a_half_precision_gradient() -> None:
    grad = torch.ones(1, 1, dtype=torch.bfloat16)
    other = torch.full((1, 1), 1.0 + 3 * 2**-9)
    got = precondition(grad, other, "B", 1.0, 0.0)
    assert got == torch.tensor((1.0 + 3 * 2**-9) ** -2).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", ["A", "B"])
@given(ranks, seeds)
def test_singular_gram_matrix_without_ridge_is_refused(
    factor: str, dtype: torch.dtype, rank: int, seed: int
) -> None:
    deficient = draw(seed, rank, rank - 1) @ draw(seed + 1, rank - 1, 40)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    other = torch.from_numpy(deficient).to(wide)
    grad = torch.ones(rank, 5, dtype=dtype)
    if factor == "A":
        other = other.t()
    else:
        grad = grad.t()
    with pytest.raises(InvalidValue, match="singular") as caught:
        precondition(grad, other, factor, 1.0, 0.0)
    assert caught.value.key == "ridge"
    assert torch.isfinite(precondition(grad, other, factor, 1.0, 0.1)).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_regular_factors_of_any_size_are_accepted(scale: float) -> None:
    for seed in range(50):
        other = torch.from_numpy(scale * draw(seed, 8, 768)).float()
        grad = torch.from_numpy(draw(seed + 1, 5, 8)).float()
        got = precondition(grad, other, "B", 1.0, 0.0).double()
        expected = grad.double() @ torch.linalg.inv(other.double() @ other.double().t())
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_ranks_of_unequal_size_are_not_taken_for_singular() -> None:
    sizes = torch.tensor([1.0, 1e-4, 1e4])
    other = sizes[:, None] * torch.from_numpy(draw(0, 3, 50)).float()
    grad = torch.from_numpy(draw(1, 4, 3)).float() * sizes
    got = precondition(grad, other, "B", 1.0, 0.0).double()
    expected = grad.double() @ torch.linalg.inv(other.double() @ other.double().t())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 10.0])
def test_at_the_start_of_b_a_ridge_scales_the_gradient(ridge: float) -> None:
    grad = torch.from_numpy(draw(0, 4, 6)).float()
    got = precondition(grad, torch.zeros(9, 4), "A", 2.0, ridge)
    torch.testing.assert_close(got, grad / (4 * ridge))
    with pytest.raises(InvalidValue, match="singular"):
        precondition(grad, torch.zeros(9, 4), "A", 2.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"factor": "C"}, "factor", "'A' or 'B'"),
        ({"factor": "b"}, "factor", "'A' or 'B'"),
        ({"ridge": -1e-3}, "ridge", "at least 0"),
        ({"ridge": math.nan}, "ridge", "at least 0"),
        ({"other": torch.full((2, 2), math.nan)}, "ridge", "singular"),
        ({"other": torch.full((2, 2), math.inf)}, "ridge", "singular"),
    ],
)
def test_what_cannot_be_solved_is_refused(changes: dict[str, Any], key: str, expected: str) -> None:
    good: dict[str, Any] = {
        "grad": torch.ones(2, 2),
        "other": torch.eye(2),
        "factor": "B",
        "scaling": 1.0,
        "ridge": 0.0,
    }
    precondition(**good)
    with pytest.raises(InvalidValue, match=expected) as caught:
        precondition(**{**good, **changes})
    assert caught.value.key == key
