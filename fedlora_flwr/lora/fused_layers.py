"""Fused attention layers that are split, so queries, keys and values get separate adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue

PARTS = ("q", "k", "v")
_FUSED = "qkv"


class SplitLinear(nn.Module):
    """A fused linear layer as three layers, whose concatenated outputs are those of the original.

    An adapter on one part changes one third of the fused layer's outputs.

    Parameters
    ----------
    fused : nn.Linear
        The layer. It has 3m outputs: first those of queries, then of keys, then of values.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        size = fused.out_features // len(PARTS)
        for number, name in enumerate(PARTS):
            rows = slice(number * size, (number + 1) * size)
            part = nn.Linear(
                fused.in_features, size, fused.bias is not None, device=fused.weight.device
            ).to(fused.weight.dtype)
            if fused.weight.device.type != "meta":
                with torch.no_grad():
                    part.weight.copy_(fused.weight[rows])
                    if fused.bias is not None:
                        part.bias.copy_(fused.bias[rows])
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused layer's output, (…, n) to (…, 3m)."""
        return torch.cat([self.get_submodule(name)(x) for name in PARTS], dim=-1)


def split_fused(model: nn.Module) -> None:
    """Split every fused layer of queries, keys and values, in place.

    Raises
    ------
    InvalidValue
        The model has no such layer; a layer's number of outputs is not a multiple of 3; or the
        attention reads a layer's weight instead of calling the layer.
    """
    named = dict(model.named_modules())
    found = 0
    for name, module in named.items():
        parent, _, own = name.rpartition(".")
        if own != _FUSED or not isinstance(module, nn.Linear):
            continue
        attention = named[parent]
        # An attention with a ``q_bias`` multiplies by the weight and adds its own biases. It never
        # calls the layer, so an adapter on it would have no effect.
        if getattr(attention, "q_bias", None) is not None or module.out_features % len(PARTS):
            raise _refused(f"attention reads the weight of {name!r}, or it has other outputs")
        setattr(attention, own, SplitLinear(module))
        found += 1
    if not found:
        raise _refused("it has no linear layer named qkv")


def _refused(reason: str) -> InvalidValue:
    return InvalidValue("split-qkv", True, f"false for this model: {reason}")


def fused_name(model: nn.Module, layer: str) -> str:
    """Return the name of the fused layer of which a layer is a part; empty if it is not a part."""
    parent, _, own = layer.rpartition(".")
    is_part = own in PARTS and parent and isinstance(model.get_submodule(parent), SplitLinear)
    return parent if is_part else ""


def fused_factors(parts: Mapping[str, tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """Combine the adapters of a layer's parts into one adapter of the fused layer.

    Parameters
    ----------
    parts : Mapping[str, tuple[Tensor, Tensor]]
        For some or all of ``q``, ``k`` and ``v``: B, shape (m, r), and A, shape (r, n).
    rows : int
        m, the number of outputs of one part.

    Returns
    -------
    tuple[Tensor, Tensor]
        B, shape (3m, sum of r), which is zero outside each part's rows and ranks; and A, shape
        (sum of r, n).
    """
    columns = []
    for number, name in enumerate(PARTS):
        if name in parts:
            b, _ = parts[name]
            columns.append(nn.functional.pad(b, (0, 0, number * rows, (2 - number) * rows)))
    return torch.cat(columns, 1), torch.cat([parts[name][1] for name in PARTS if name in parts])
