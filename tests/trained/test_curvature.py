"""Products with a Hessian, its largest eigenvalue and its trace, against known Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.trained.curvature import Surface, hutchinson, largest_eigenvalue

Vector = NDArray[np.float64]


def spectrum(values: Vector, seed: int = 0) -> NDArray[np.float64]:
    """Return a symmetric matrix with these eigenvalues."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return np.asarray((basis * values) @ basis.T)


def quadratic(matrix: NDArray[np.float64]) -> tuple[Surface, nn.Parameter]:
    """Return ½ xᵀ M x of a point x in fp64."""
    x = nn.Parameter(torch.randn(len(matrix), generator=torch.Generator().manual_seed(1)).double())
    wide = torch.from_numpy(matrix)
    return Surface([x], [lambda: 0.5 * x @ wide @ x]), x


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-3.0, 7.0, 80),
        np.array([0.01] * 59 + [5.0]),
        np.array([-9.0, *np.linspace(0.0, 4.0, 60)]),
        np.array([2.0, 1.0, -4.0]),
    ],
    ids=["even", "one stands out", "a larger negative one", "few"],
)
def test_the_spectrum_of_a_quadratic_is_found(values: Vector) -> None:
    matrix = spectrum(values)
    surface, x = quadratic(matrix)
    at = x.detach().numpy().copy()
    np.testing.assert_allclose(surface.gradient(), matrix @ at, atol=1e-12)
    rng = np.random.default_rng(2)
    vector = rng.standard_normal(surface.size)
    np.testing.assert_allclose(surface.product(vector), matrix @ vector, atol=1e-12)

    found = largest_eigenvalue(surface.product, surface.size)
    assert found.value == pytest.approx(values.max(), rel=1e-3)
    assert found.residual < 1e-2 * values.max()

    trace = hutchinson(surface.product, surface.size, probes=400)
    assert trace.value == pytest.approx(values.sum(), abs=4 * trace.error)
    # The variance per probe is twice the sum of the squares off the diagonal.
    spread = math.sqrt(2 * (np.square(matrix).sum() - np.square(np.diag(matrix)).sum()))
    assert trace.error * 20 == pytest.approx(spread, rel=0.2)
    assert np.array_equal(x.detach().numpy(), at)


def test_a_search_that_does_not_settle_says_so() -> None:
    values = np.concatenate([np.linspace(0.0, 1.0, 300), 1 + np.linspace(0.0, 1e-7, 100)])
    with pytest.raises(FedLoRAError, match=r"did not settle within \d+ products\. Measure fewer"):
        largest_eigenvalue(lambda v: values * v, len(values), tolerance=1e-14, restarts=2)


class Attention(nn.Module):
    """One layer of attention, and a layer that reads its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        found: Tensor = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(dim=1))
        return found


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.inner(x)).mean(dim=1))
        return found


@pytest.mark.parametrize("kind", [Attention, Perceptron])
def test_a_network_has_the_curvature_of_its_whole_hessian(kind: Callable[[], nn.Module]) -> None:
    """The Hessian is formed by forward differentiation of the gradient, and by differences."""
    torch.manual_seed(0)
    model = kind().double()
    x, y = torch.randn(9, 5, 4).double(), torch.randint(0, 3, (9,))
    names, parameters = zip(*model.named_parameters(), strict=True)
    shapes = [p.shape for p in parameters]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        given = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        said = torch.func.functional_call(model, given, (x,))
        return F.cross_entropy(said, y)

    at = torch.cat([p.detach().flatten() for p in parameters])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slope = torch.func.grad(loss)
        whole = torch.func.jacfwd(slope)(at).numpy()
        steps = 1e-5 * torch.eye(len(at)).double()
        nudged = [(slope(at + step) - slope(at - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(torch.stack(nudged).numpy(), whole, atol=1e-7)

    halves = (slice(0, 4), slice(4, 9))
    surface = Surface(
        list(parameters),
        [lambda s=s: F.cross_entropy(model(x[s]), y[s], reduction="sum") / 9 for s in halves],  # type: ignore[misc]
    )
    assert surface.size == len(at) > 32
    np.testing.assert_allclose(surface.gradient(), slope(at).numpy(), atol=1e-12)
    vector = np.random.default_rng(0).standard_normal(surface.size)
    np.testing.assert_allclose(surface.product(vector), whole @ vector, atol=1e-10)
    top = largest_eigenvalue(surface.product, surface.size)
    assert top.value == pytest.approx(np.linalg.eigvalsh(whole)[-1], rel=1e-3)
    trace = hutchinson(surface.product, surface.size, probes=60)
    assert trace.value == pytest.approx(np.trace(whole), abs=4 * trace.error)


def test_a_logistic_regression_has_its_textbook_hessian() -> None:
    """``Xᵀ diag(p (1 - p)) X / n``; and a parameter that the loss does not read bends nothing."""
    rng = np.random.default_rng(3)
    rows, labels = rng.standard_normal((40, 5)), rng.integers(0, 2, 40)
    weight, unread = nn.Parameter(torch.zeros(5).double()), nn.Parameter(torch.ones(2).double())
    x, y = torch.from_numpy(rows), torch.from_numpy(labels).double()
    surface = Surface([weight, unread], [lambda: F.binary_cross_entropy_with_logits(x @ weight, y)])
    expected = np.zeros((7, 7))
    expected[:5, :5] = rows.T @ rows / 4 / 40
    formed = np.stack([surface.product(row) for row in np.eye(7)])
    np.testing.assert_allclose(formed, expected, atol=1e-12)


def test_a_linear_loss_is_flat() -> None:
    x = nn.Parameter(torch.ones(3))
    surface = Surface([x], [lambda: 2 * x.sum()])
    assert surface.product(np.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert largest_eigenvalue(surface.product, 3).value == 0


def test_a_move_is_taken_back_bit_for_bit() -> None:
    x = nn.Parameter(torch.tensor([0.1, 1e8]), requires_grad=False)
    surface = Surface([x], [lambda: x.square().sum()])
    before = x.clone()
    with surface.moved(np.array([0.3, 0.3])):
        assert x[0].item() == pytest.approx(0.4)
    assert torch.equal(x, before)
    surface.gradient()
    assert not x.requires_grad
