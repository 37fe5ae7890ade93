"""Lower precision for the frozen backbone; adapters, head, clipping and sums stay fp32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

_fp32_only: ContextVar[bool] = ContextVar("_fp32_only", default=False)
_gradients: ContextVar[bool | None] = ContextVar("_gradients", default=None)


def run_in_bf16(model: nn.Module) -> None:
    """Make a model's forward pass multiply in bfloat16 and return fp32.

    Autocast chooses the precision of each operation: matrix products run in bfloat16; softmax,
    normalization and losses run in fp32. Parameters keep their type.

    Parameters
    ----------
    model : nn.Module
        The model; its ``forward`` is replaced. A second call has no further effect.
    """
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        device = next(model.parameters()).device.type
        # On "meta", tensors have shapes but no values, so precision has no meaning.
        if device == "meta" or _fp32_only.get():
            return whole(*args, **kwargs)
        with torch.autocast(device, torch.bfloat16), _attention(device):
            found = whole(*args, **kwargs)
        return tree_map(_in_full, found)

    model.forward = forward
    model._in_bf16 = True  # type: ignore[assignment,unused-ignore]


def as_in_forward(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a backward pass that computes activations again does it alike.

    A gradient checkpoint restores autocast, but not the choice of the attention's kernel.
    """
    device = next(model.parameters()).device.type
    if not getattr(model, "_in_bf16", False) or _fp32_only.get():
        return nullcontext()
    return _attention(device)


@contextmanager
def fp32_only() -> Iterator[None]:
    """Suspend `run_in_bf16` for all models, for checks that rounding errors would mislead."""
    token = _fp32_only.set(True)
    try:
        yield
    finally:
        _fp32_only.reset(token)


@contextmanager
def kernels_of(gradients: bool) -> Iterator[None]:
    """Choose kernels as where gradients are computed, or are not, in spite of torch's own mode."""
    token = _gradients.set(gradients)
    try:
        yield
    finally:
        _gradients.reset(token)


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Return a context in which nothing on the tensor's device is cast to a lower precision."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _attention(device: str) -> AbstractContextManager[None]:
    """Choose the attention kernel: on a CPU, the fused kernel's bf16 gradient is very slow."""
    gradients = _gradients.get()
    if device == "cpu" and (torch.is_grad_enabled() if gradients is None else gradients):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _in_full(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if half else value
