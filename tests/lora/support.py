"""Folded pairs, and the dense weights that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.adapters import AdaptedLinear, AdaptedModel
from tests.models import (
    FAMILIES,
)

Arrays = dict[str, NDArray[np.float32]]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
RANKS = (2, 0, 1, 5)


def folded(layers: Iterable[AdaptedLinear], seed: int, ranks: tuple[int, ...] = RANKS) -> Arrays:
    """Return a random pair for every layer, of these ranks in turn."""
    rng, arrays = np.random.default_rng(seed), {}
    for i, layer in enumerate(layers):
        q, (b, a) = ranks[i % len(ranks)], folded_names(layer.name)
        arrays[b] = 0.3 * rng.normal(size=(layer.B.shape[0], q)).astype(np.float32)
        arrays[a] = 0.3 * rng.normal(size=(q, layer.A.shape[1])).astype(np.float32)
    return arrays


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def state_bits(adapted: AdaptedModel) -> dict[str, bytes]:
    """Return the bits of every parameter and buffer of the whole model."""
    model = adapted.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return bits({name: tensor.detach() for name, tensor in tensors.items()})
