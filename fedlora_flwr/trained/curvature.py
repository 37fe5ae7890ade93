"""Curvature of a loss around a model: products with the Hessian, its top eigenvalue, its trace.

The Hessian of D parameters has D² entries and is never formed. A product with it is a second
backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora_flwr.errors import FedLoRAError

Vector: TypeAlias = NDArray[np.float64]

_DENSE = 32
"""Up to this many parameters, the Hessian is formed: Lanczos needs more than a few."""


class Surface:
    """A mean loss as a function of some parameters, taken as one vector in fp64.

    Parameters
    ----------
    parameters : Sequence[nn.Parameter]
        The parameters; all others are held fixed. They keep their own type and device.
    terms : Sequence[Callable[[], Tensor]]
        Each returns a number that depends on the parameters. The loss is their sum, so that a mean
        over many records takes one batch at a time.

    Examples
    --------
    >>> x = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> surface = Surface([x], [lambda: (x**2 * torch.tensor([1.0, 3.0])).sum()])
    >>> surface.value(), surface.gradient().tolist(), surface.product(np.ones(2)).tolist()
    (13.0, [2.0, 12.0], [2.0, 6.0])
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], terms: Sequence[Callable[[], Tensor]]
    ) -> None:
        self._parameters, self._terms = list(parameters), list(terms)

    @property
    def size(self) -> int:
        """Number D of coordinates."""
        return sum(parameter.numel() for parameter in self._parameters)

    def value(self) -> float:
        """Return the loss."""
        with torch.no_grad():
            return float(sum(float(term()) for term in self._terms))

    def gradient(self) -> Vector:
        """Return the gradient, shape (D,)."""
        total = np.zeros(self.size)
        with self._differentiable():
            for term in self._terms:
                total += self._flat(self._gradients(term(), self._parameters))
        return total

    def product(self, vector: Vector) -> Vector:
        """Return the Hessian times a vector.

        Parameters
        ----------
        vector : ndarray
            Shape (D,).

        Returns
        -------
        ndarray
            Shape (D,).
        """
        total, parts = np.zeros(self.size), self._split(vector)
        with self._differentiable():
            for term in self._terms:
                first = self._gradients(term(), self._parameters, keep=True)
                # A gradient that is constant has no second derivative.
                bent = [(g, v) for g, v in zip(first, parts, strict=True) if g.requires_grad]
                if bent:
                    slope = torch.stack([(g * v).sum() for g, v in bent]).sum()
                    total += self._flat(self._gradients(slope, self._parameters))
        return total

    @contextmanager
    def moved(self, direction: Vector) -> Iterator[None]:
        """Move the parameters by a vector, shape (D,), and put their own values back afterward."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        try:
            with torch.no_grad():
                for parameter, step in zip(self._parameters, self._split(direction), strict=True):
                    parameter.add_(step)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, before, strict=True):
                    parameter.copy_(value)

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        asked = [parameter.requires_grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            # The fused kernels of attention have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for parameter, before in zip(self._parameters, asked, strict=True):
                parameter.requires_grad_(before)

    def _gradients(
        self, value: Tensor, parameters: Sequence[nn.Parameter], keep: bool = False
    ) -> Sequence[Tensor]:
        return torch.autograd.grad(
            value, parameters, create_graph=keep, allow_unused=True, materialize_grads=True
        )

    def _split(self, vector: Vector) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        pieces = np.split(vector, np.cumsum(sizes)[:-1])
        return [
            torch.from_numpy(piece).to(parameter.dtype).to(parameter.device).view_as(parameter)
            for piece, parameter in zip(pieces, self._parameters, strict=True)
        ]

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Vector:
        parts = [tensor.detach().cpu().double().flatten().numpy() for tensor in tensors]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue of a symmetric matrix.

    Parameters
    ----------
    value : float
        The eigenvalue, with its sign.
    residual : float
        ``‖H v - λ v‖`` for the unit vector v that was found. Some eigenvalue is at most this far
        from ``value``.
    products : int
        How often the matrix was multiplied by a vector.
    """

    value: float
    residual: float
    products: int


def largest_eigenvalue(
    product: Callable[[Vector], Vector],
    size: int,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
    restarts: int = 100,
) -> Eigenvalue:
    """Find the largest eigenvalue of a symmetric matrix by Lanczos with restarts (ARPACK).

    Parameters
    ----------
    product : callable
        Multiplies the matrix by a vector of shape (size,).
    size : int
        Number of rows.
    seed : int (default: 0)
        Seed of the vector that the search starts from.
    tolerance : float (default: 1e-3)
        Largest residual, relative to the eigenvalue.
    restarts : int (default: 100)
        Most restarts.

    Raises
    ------
    FedLoRAError
        The search did not end within ``restarts``.

    Examples
    --------
    >>> found = largest_eigenvalue(lambda v: np.arange(1.0, 51.0) * v, 50)
    >>> round(found.value, 2)
    50.0
    """
    from scipy.sparse.linalg import (  # type: ignore[import-untyped]
        ArpackNoConvergence,
        LinearOperator,
        eigsh,
    )

    count = 0

    def counted(vector: Vector) -> Vector:
        nonlocal count
        count += 1
        return product(np.asarray(vector, dtype=np.float64).reshape(-1))

    if size <= _DENSE:
        columns = np.stack([counted(row) for row in np.eye(size)])
        values, vectors = np.linalg.eigh((columns + columns.T) / 2)
    else:
        operator = LinearOperator((size, size), matvec=counted, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(size)
        options: dict[str, Any] = {"v0": start, "tol": tolerance, "maxiter": restarts}
        try:
            values, vectors = eigsh(operator, k=1, which="LA", **options)
        except ArpackNoConvergence as error:
            raise FedLoRAError(
                f"The largest eigenvalue of the Hessian did not settle within {count} products. "
                "Measure fewer parts, such as parts = 'B', or more records."
            ) from error
    value, vector = float(values[-1]), vectors[:, -1]
    residual = float(np.linalg.norm(counted(vector) - value * vector))
    return Eigenvalue(value, residual, count)


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace.

    Parameters
    ----------
    value : float
        Mean over the probes.
    error : float
        Its standard error; NaN for a single probe.
    """

    value: float
    error: float


def hutchinson(
    product: Callable[[Vector], Vector], size: int, *, probes: int = 30, seed: int = 0
) -> Trace:
    """Estimate the trace of a symmetric matrix from random signs (Hutchinson, 1990).

    The mean of ``zᵀ H z`` over vectors z of random signs is the trace. Its variance per probe is
    twice the sum of the squares of the entries that are not on the diagonal.

    Parameters
    ----------
    product : callable
        Multiplies the matrix by a vector of shape (size,).
    size : int
        Number of rows.
    probes : int (default: 30)
        Number of vectors.
    seed : int (default: 0)
        Seed of the signs.

    Examples
    --------
    >>> hutchinson(lambda v: np.arange(1.0, 5.0) * v, 4).value
    10.0
    """
    rng = np.random.default_rng(seed)
    found = np.empty(probes)
    for number in range(probes):
        signs = rng.choice((-1.0, 1.0), size)
        found[number] = signs @ product(signs)
    error = float(found.std(ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return Trace(float(found.mean()), error)
