"""Per-record gradients of LoRA factors and linear heads, computed inside the backward pass.

Opacus' module hooks assume that the first axis counts records. This fails on windowed attention.
The hooks also break when factors are frozen and unfrozen after wrapping. Here each adapted layer
runs its own autograd function. Its backward pass sums over all rows of a record, also where the
model has folded other axes into the batch axis, and writes the result to ``parameter.grad_sample``,
where Opacus' optimizer reads it. The ordinary gradient of a factor is never computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedLinear, AdaptedModel, HeadLinear
from fedlora_flwr.lora.precision import full_precision


class GradSampler:
    """Makes a model write per-record gradients of its active parameters.

    It is installed once. At each forward pass, the parameters that require a gradient get one, so
    the active factors may change between passes.

    Parameters
    ----------
    adapted : AdaptedModel
        The model. Its adapted and head layers get a new ``forward``.

    Attributes
    ----------
    num_records : int
        Number of records in the current batch; set it before the forward pass.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.num_records = 0
        for layer in adapted.layers:
            layer.module.forward = partial(_adapted_forward, self, layer)
        for linear in adapted.head:
            linear.module.forward = partial(_head_forward, self, linear)  # type: ignore[method-assign]

    def rows(self, tensor: Tensor, name: str) -> Tensor:
        """Reshape a layer's rows, shape (..., features), to (records, rows per record, features).

        Raises
        ------
        PrivacyViolation
            The rows do not divide evenly among the records.
        """
        rows = tensor.numel() // tensor.shape[-1]
        if not self.num_records or rows % self.num_records:
            raise PrivacyViolation(
                f"Layer {name!r} saw {rows} rows for {self.num_records} records: its rows cannot "
                "be told apart by record."
            )
        return tensor.reshape(self.num_records, -1, tensor.shape[-1])


def _adapted_forward(
    sampler: GradSampler, layer: AdaptedLinear, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if layer.enabled and not args and not kwargs and _fuses(layer, x):
        base = layer.base
        return _FusedLinear.apply(x, base.weight, base.bias, layer.A, layer.B, layer, sampler)  # type: ignore[no-any-return,no-untyped-call,unused-ignore]
    result: Tensor = layer.base(x, *args, **kwargs)
    if not layer.enabled:
        return result
    with full_precision(x):
        inputs = layer.dropout(x.to(layer.A.dtype))
        update: Tensor = _LoRAUpdate.apply(inputs, layer.A, layer.B, layer, sampler)  # type: ignore[no-untyped-call,unused-ignore]
    return result + update.to(result.dtype)


def _fuses(layer: AdaptedLinear, x: Tensor) -> bool:
    """Tell whether the frozen layer is a plain product, with the same dtype as the adapter's."""
    base, dropout = layer.base, layer.dropout
    return (
        type(base) is nn.Linear
        and "forward" not in vars(base)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and (isinstance(dropout, nn.Identity) or not dropout.training)
        and x.dtype == base.weight.dtype == layer.A.dtype == layer.B.dtype
        and x.device.type != "meta"  # It has shapes only, and torch has no autocast for it.
        and not torch.is_autocast_enabled(x.device.type)
    )


def _head_forward(sampler: GradSampler, linear: HeadLinear, x: Tensor) -> Tensor:
    module = linear.module
    with full_precision(x):
        inputs = x.to(module.weight.dtype)
        output: Tensor = _Linear.apply(inputs, module.weight, module.bias, linear, sampler)  # type: ignore[no-untyped-call,unused-ignore]
    return output


class _LoRAUpdate(torch.autograd.Function):
    """``s B (A x)``; keeps only the arrays that the active factors need for their gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: AdaptedLinear, sampler: GradSampler
    ) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad[1:3]
        hidden = F.linear(x, A) * layer.scaling
        ctx.layer, ctx.sampler = layer, sampler
        ctx.save_for_backward(A, B, x if needs_a else None, hidden if needs_b else None)
        return F.linear(hidden, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override,unused-ignore]
        A, B, x, hidden = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        grad_hidden = _factors(ctx, grad, B, x, hidden, (needs_a, needs_b), needs_x)
        return grad_hidden @ A if needs_x else None, None, None, None, None


class _FusedLinear(torch.autograd.Function):
    """``W x + b + s B (A x)``, added up in place, without a second array of the output's size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        layer: AdaptedLinear,
        sampler: GradSampler,
    ) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad[3:5]
        hidden = F.linear(x, A) * layer.scaling
        ctx.layer, ctx.sampler = layer, sampler
        ctx.save_for_backward(weight, A, B, x if needs_a else None, hidden if needs_b else None)
        output = F.linear(x, weight, bias)
        _flat(output).addmm_(_flat(hidden), B.t())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override,unused-ignore]
        weight, A, B, x, hidden = ctx.saved_tensors
        needs_x, (needs_a, needs_b) = ctx.needs_input_grad[0], ctx.needs_input_grad[3:5]
        grad_hidden = _factors(ctx, grad, B, x, hidden, (needs_a, needs_b), needs_x)
        if not needs_x:
            return (None,) * 7
        grad_x = grad @ weight
        _flat(grad_x).addmm_(_flat(grad_hidden), A)
        return grad_x, *(None,) * 6


def _factors(
    ctx: Any,
    grad: Tensor,
    B: Tensor,
    x: Tensor,
    hidden: Tensor,
    needs: tuple[bool, bool],
    needs_hidden: bool,
) -> Tensor:
    """Write the per-record gradients of A and B where needed, and return the gradient of A x.

    Where the gradient of A x isn't needed, ``grad`` is returned and the caller ignores it.
    """
    layer, sampler = ctx.layer, ctx.sampler
    needs_a, needs_b = needs
    if needs_b:
        # G_B = s g^T (A x), summed over a record's rows: (records, m, r).
        g, h = sampler.rows(grad, layer.name), sampler.rows(hidden, layer.name)
        _add(layer.B, torch.bmm(g.transpose(1, 2), h))
    if not (needs_a or needs_hidden):
        return grad
    grad_hidden: Tensor = (grad @ B) * layer.scaling
    if needs_a:
        # G_A = s (g B)^T x: (records, r, n).
        g, h = sampler.rows(grad_hidden, layer.name), sampler.rows(x, layer.name)
        _add(layer.A, torch.bmm(g.transpose(1, 2), h))
    return grad_hidden


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])


class _Linear(torch.autograd.Function):
    """``W x + b`` of a head whose weight and bias train directly."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        linear: HeadLinear,
        sampler: GradSampler,
    ) -> Tensor:
        ctx.linear, ctx.sampler = linear, sampler
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override,unused-ignore]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        module, name = ctx.linear.module, ctx.linear.name
        g = ctx.sampler.rows(grad, name)
        if needs_weight:
            _add(module.weight, torch.bmm(g.transpose(1, 2), ctx.sampler.rows(x, name)))
        if needs_bias:
            _add(module.bias, g.sum(dim=1))
        return grad @ weight if needs_x else None, None, None, None, None


def _add(parameter: nn.Parameter, grad_sample: Tensor) -> None:
    """Add a gradient to those that earlier uses of the same layer in this pass have written."""
    held = getattr(parameter, "grad_sample", None)
    parameter.grad_sample = grad_sample if held is None else held + grad_sample  # type: ignore[attr-defined]
