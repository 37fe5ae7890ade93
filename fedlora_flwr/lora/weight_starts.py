"""Starts of the adapters that are made from the frozen weights alone.

LoRA starts from a random A and B = 0. PiSSA (arXiv 2404.02948) starts from the largest singular
values of a layer's weight, OLoRA (arXiv 2406.01775) from the first columns of its QR decomposition.
In both the product of the factors is taken away from the frozen weight, so that the model is the
same at the start. Here the server makes the factors once, and takes the product away by a folded
pair (see `fedlora_flwr.layout.folded_names`), which travels with every download. Clients need no
decomposition, which could differ between machines, and an export holds the pair.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedModel

RANDOM, PISSA, OLORA = "random", "pissa", "olora"
STARTS = (RANDOM, PISSA, OLORA)


def check_start(adapted: AdaptedModel, how: str) -> None:
    """Refuse a start that the model's weights cannot have; values are not read.

    Parameters
    ----------
    adapted : AdaptedModel
        The model, which may be on the meta device.
    how : str
        One of `STARTS`.

    Raises
    ------
    InvalidValue
        There is no such start, the rank is larger than a side of a layer, or a weight is quantized
        or shared with another layer.
    """
    if how not in STARTS:
        raise unknown("lora-init", how, STARTS)
    if how == RANDOM:
        return
    adapted.folded.check_weights()
    for layer in adapted.layers:
        most = min(layer.B.shape[0], layer.A.shape[1])
        if adapted.rank > most:
            allowed = f"at most {most} with lora-init = {how!r}, the shorter side of {layer.name}"
            raise InvalidValue("rank", adapted.rank, allowed)


def folded_shapes(adapted: AdaptedModel, how: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the folded pairs of a start, by name; none for a random one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapted.layers if how != RANDOM else ():
        b, a = folded_names(layer.name)
        shapes[b], shapes[a] = tuple(layer.B.shape), tuple(layer.A.shape)
    return shapes


@torch.no_grad()
def weight_start(adapted: AdaptedModel, how: str) -> dict[str, NDArray[np.float32]]:
    """Return the factors of a start and the folded pairs that take their product away.

    Parameters
    ----------
    adapted : AdaptedModel
        The model with its own frozen weights; it does not change.
    how : str
        ``"pissa"`` or ``"olora"``.

    Returns
    -------
    dict[str, ndarray]
        For each layer A (r, n), B (m, r) and the folded pair (-B, A), fp32.

    Raises
    ------
    InvalidValue
        See `check_start`.
    """
    check_start(adapted, how)
    found: dict[str, NDArray[np.float32]] = {}
    for layer in adapted.layers:
        weight = adapted.folded.own_weight(layer.name).detach().cpu().double()
        # The model adds s B A. PiSSA divides by s first; OLoRA takes away s times its product.
        made = _pissa(weight / layer.scaling) if how == PISSA else _olora(weight)
        b = made[0][:, : adapted.rank].float().contiguous().numpy()
        a = made[1][: adapted.rank].float().contiguous().numpy()
        found[f"{layer.name}.lora_A.weight"], found[f"{layer.name}.lora_B.weight"] = a, b
        b_name, a_name = folded_names(layer.name)
        found[b_name], found[a_name] = -b, a.copy()
    return found


def _pissa(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U √S`` and ``√S Vᵀ``, the largest singular values first."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u * s.sqrt(), s.sqrt()[:, None] * vt


def _olora(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, whose columns are orthonormal, and R."""
    q, r = torch.linalg.qr(weight)
    return q, r
