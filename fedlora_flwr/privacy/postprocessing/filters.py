"""Low-pass filters on the privatized gradient, which trade noise for bias.

A filter reads released gradients and public constants only. It is post-processing, at no privacy
cost.

Spatial filters smooth along the long side of a LoRA factor and leave the head as it is: the
binomial kernel of LA-LoRA (arXiv 2602.19926) and Laplacian smoothing (arXiv 1806.06317). Temporal
filters average over the local steps of a round: an exponential moving average, and the
first-order low-pass filter of DOPPLER (arXiv 2408.13460).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora_flwr.errors import unknown
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import B

_LAMBDA = 1.0  # strength of Laplacian smoothing


class GradientFilter(Protocol):
    """A linear filter on privatized gradients, with the state of one client's round."""

    def __call__(self, name: str, grad: Tensor) -> Tensor:
        """Filter the next privatized gradient of an array.

        Parameters
        ----------
        name : str
            The array's name, e.g. ``"blocks.0.attn.qkv.lora_A.weight"``.
        grad : Tensor
            (r, n) for A, (m, r) for B, any shape for the head. It is not written to. Where nothing
            is filtered, this same tensor is returned.
        """

    def noise_gain(self, name: str) -> float:
        """Return the factor by which the last filtering has multiplied the variance of white noise.

        It is the mean over coordinates, for noise that is independent between coordinates and
        steps.

        Raises
        ------
        KeyError
            The factor depends on the array's shape or steps, and it has not been filtered yet.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is carried from one gradient to the next: numbers and arrays."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


class _Memoryless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class NoFilter(_Memoryless):
    """Leaves gradients as they are."""

    def __call__(self, name: str, grad: Tensor) -> Tensor:  # noqa: ARG002, D102
        return grad

    def noise_gain(self, name: str) -> float:  # noqa: ARG002, D102
        return 1.0


class SpatialFilter(_Memoryless):
    """Smooths A along its input dimension and B along its output dimension, each rank on its own.

    Parameters
    ----------
    smooth : callable
        Smooths each row of a matrix on its own, and does not write to the matrix.
    gain : callable
        Maps the length of a row to the mean gain of white noise's variance.
    """

    def __init__(self, smooth: Callable[[Tensor], Tensor], gain: Callable[[int], float]) -> None:
        self._smooth = smooth
        self._gain = gain
        self._sizes: dict[str, int] = {}

    def __call__(self, name: str, grad: Tensor) -> Tensor:  # noqa: D102
        factor = factor_of(name)
        if factor is None:
            return grad
        rows = _wide(grad.t() if factor == B else grad)
        self._sizes[name] = rows.shape[-1]
        rows = self._smooth(rows).to(grad.dtype)
        return (rows.t() if factor == B else rows).contiguous()

    def noise_gain(self, name: str) -> float:  # noqa: D102
        return 1.0 if factor_of(name) is None else self._gain(self._sizes[name])


class TemporalFilter:
    """First-order recursive filter of each array over the steps in which this array trained.

    The recursion ``y_t = b_0 g_t + b_1 g_{t-1} - a y_{t-1}`` starts at zero. Its output is divided
    by its output for a constant input of 1, so that a constant gradient passes unchanged from the
    first step on.
    """

    def __init__(self, a: float, b: tuple[float, float]) -> None:
        self._a = a
        self._b = b
        self._steps: dict[str, int] = {}
        # What earlier steps add to the next output: one tensor per array, never the caller's.
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, grad: Tensor) -> Tensor:
        """Advance the array's state by one step and return the bias-corrected output."""
        now = _wide(grad)
        output = self._b[0] * now
        if name in self._memory:
            output += self._memory[name].to(output.device)
        self._memory[name] = self._b[1] * now - self._a * output
        self._steps[name] = self._steps.get(name, 0) + 1
        return (output / float(self._impulse_response(name).sum())).to(grad.dtype)

    def noise_gain(self, name: str) -> float:
        """Return the gain after the steps so far; it falls from 1 toward its limit."""
        response = self._impulse_response(name)
        return float((response**2).sum() / response.sum() ** 2)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and the memory of each array."""
        memory = {name: tensor.cpu().numpy() for name, tensor in self._memory.items()}
        return {"steps": dict(self._steps), "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the steps and the memory of each array."""
        self._steps = dict(state["steps"])
        self._memory = {name: torch.tensor(array) for name, array in state["memory"].items()}

    def _impulse_response(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        tail = (-self._a) ** np.arange(self._steps[name] - 1, dtype=np.float64)
        return np.concatenate(([self._b[0]], (self._b[1] - self._a * self._b[0]) * tail))


def _wide(grad: Tensor) -> Tensor:
    """Convert half precision to fp32: its range is too small for sums, and FFTs refuse it."""
    return grad.detach().to(torch.promote_types(grad.dtype, torch.float32))


def _binomial(rows: Tensor) -> Tensor:
    """Convolve with [1, 4, 6, 4, 1]/16, as [1, 2, 1]/4 twice.

    Each pass pads by one and repeats the edge. Since the kernel is symmetric, this is the same as
    padding by two, mirrored at the edge, before one pass of the whole kernel.
    """
    for _ in range(2):
        padded = torch.cat((rows[..., :1], rows, rows[..., -1:]), dim=-1)
        rows = (padded[..., :-2] + 2 * rows + padded[..., 2:]) / 4
    return rows


@cache
def _binomial_gain(size: int) -> float:
    # The filter's matrix is symmetric, with eigenvalues cos⁴(πk/2n) in the cosine basis.
    return float(np.mean(np.cos(np.pi * np.arange(size) / (2 * size)) ** 8))


def _laplacian(rows: Tensor) -> Tensor:
    """Solve (I + λL)x = row, with L the periodic second difference."""
    size = rows.shape[-1]
    omega = torch.arange(size // 2 + 1, dtype=rows.dtype, device=rows.device) * (math.tau / size)
    spectrum = torch.fft.rfft(rows) / (1 + 2 * _LAMBDA * (1 - omega.cos()))
    smoothed: Tensor = torch.fft.irfft(spectrum, n=size)
    return smoothed


@cache
def _laplacian_gain(size: int) -> float:
    omega = math.tau * np.arange(size) / size
    return float(np.mean((1 + 2 * _LAMBDA * (1 - np.cos(omega))) ** -2))


_MAKERS: dict[str, Callable[[], GradientFilter]] = {
    "none": NoFilter,
    "binomial": lambda: SpatialFilter(_binomial, _binomial_gain),
    "laplacian": lambda: SpatialFilter(_laplacian, _laplacian_gain),
    "ema": lambda: TemporalFilter(a=-0.9, b=(0.1, 0.0)),
    "doppler": lambda: TemporalFilter(a=-0.9, b=(0.05, 0.05)),
}
FILTERS = tuple(_MAKERS)


def make_filter(name: str) -> GradientFilter:
    """Make the filter with this name, one of `FILTERS`, with fresh state for one client's round.

    Raises
    ------
    InvalidValue
        No filter has this name.
    """
    if name not in _MAKERS:
        raise unknown("filter", name, FILTERS)
    return _MAKERS[name]()
