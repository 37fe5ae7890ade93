"""Low-rank updates folded into frozen weights: ``W0 + scaling * B A``, and back to ``W0``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import folded_names, is_folded
from fedlora_flwr.lora.exported import plain_name

if TYPE_CHECKING:
    from fedlora_flwr.lora.adapters import AdaptedLinear


class FoldedWeights:
    """Keeps the frozen weights of a model's adapted layers, and the pairs folded into them.

    A layer's original weight ``W0`` is copied before the first pair is folded into it. Every fold
    starts from ``W0``, so the weight depends on the current pair only, not on earlier ones.

    Parameters
    ----------
    layers : Sequence[AdaptedLinear]
        The adapted layers.
    model : torch.nn.Module
        The model that has these layers.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], model: nn.Module) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._model = model
        self._own: dict[str, Tensor] = {}
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        """The pairs that are folded in now, by layer: B of shape (m, q) and A of shape (q, n)."""

    def check(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Refuse folded arrays that fit no layer.

        Raises
        ------
        InvalidValue
            An array belongs to no layer or comes without its partner, the shapes do not fit, or the
            layer's weight is quantized or shared with another layer.
        """
        known = {name for layer in self._layers for name in folded_names(layer)}
        for name in arrays:
            if is_folded(name) and name not in known:
                raise InvalidValue("array", name, "a folded pair of one of the adapted layers")
        for layer in self._layers.values():
            b_name, a_name = folded_names(layer.name)
            if b_name not in arrays and a_name not in arrays:
                continue
            shapes = [arrays[n].shape if n in arrays else None for n in (b_name, a_name)]
            m, n = layer.B.shape[0], layer.A.shape[1]
            b, a = shapes
            if not (b and a and len(b) == len(a) == 2 and b == (m, a[0]) and a[1] == n):
                allowed = f"({m}, q) and (q, {n})"
                raise InvalidValue(f"shapes folded into {layer.name}", shapes, allowed)
            self._check_weight(layer)

    def check_weights(self) -> None:
        """Refuse layers whose weight cannot change; to be called before the first fold.

        Raises
        ------
        InvalidValue
            A layer's weight is quantized or shared with another layer.
        """
        for layer in self._layers.values():
            self._check_weight(layer)

    def own_weight(self, name: str) -> Tensor:
        """Return a layer's original weight W0, shape (m, n): nothing is folded into it."""
        layer = self._layers[name]
        own = self._own.get(name, _weight(layer)) if name in self.pairs else _weight(layer)
        return own.T if _transposed(layer) else own

    def _check_weight(self, layer: AdaptedLinear) -> None:
        weight, (m, n) = _weight(layer), (layer.B.shape[0], layer.A.shape[1])
        own = weight.T if _transposed(layer) else weight
        if not weight.is_floating_point() or own.shape != (m, n):
            found = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise InvalidValue(f"weight of {layer.name}", found, f"floats of shape ({m}, {n})")
        named = self._model.named_parameters(remove_duplicate=False)
        owners = [plain_name(name) for name, parameter in named if parameter is weight]
        if len(owners) > 1:
            allowed = (
                "a weight of one layer only, as updates are folded into it. Leave the layer out of "
                "lora-targets, or choose a strategy that changes no frozen weights"
            )
            raise InvalidValue(f"weight of {layer.name}", owners, allowed)

    @torch.no_grad()
    def apply(self, arrays: Mapping[str, NDArray[np.floating]]) -> None:
        """Fold in the pairs among ``arrays``; a layer without a pair gets ``W0`` back."""
        for name, layer in self._layers.items():
            b_name, a_name = folded_names(name)
            if b_name in arrays:
                self._fold(layer, arrays[b_name], arrays[a_name])
            elif name in self.pairs:
                _weight(layer).copy_(self._own[name])
                del self.pairs[name]

    def _fold(self, layer: AdaptedLinear, b: NDArray[np.floating], a: NDArray[np.floating]) -> None:
        weight = _weight(layer)
        # On the CPU and in fp64, because all clients must get exactly the same weights, with any
        # number of threads.
        pair = torch.from_numpy(np.array(b)), torch.from_numpy(np.array(a))
        if layer.name in self.pairs and all(map(torch.equal, pair, self.pairs[layer.name])):
            return
        own = self._own.setdefault(layer.name, weight.detach().clone())
        delta = layer.scaling * (pair[0].double() @ pair[1].double())
        if _transposed(layer):
            delta = delta.T
        weight.copy_((own.cpu().double() + delta).to(weight.dtype))
        self.pairs[layer.name] = pair


def _transposed(layer: AdaptedLinear) -> bool:
    return bool(getattr(layer.module, "fan_in_fan_out", False))


def _weight(layer: AdaptedLinear) -> Tensor:
    weight = layer.base.weight
    assert isinstance(weight, Tensor)
    return weight
