"""Forward passes without random draws, and forward passes with repeated random draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedlora_flwr.lora.seeded import seeded

_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
}
_MIDDLES = {torch.rand: 0.5, torch.rand_like: 0.5, torch.randn: 0.0, torch.randn_like: 0.0}


class RandomnessAtRest(TorchFunctionMode):
    """Turns dropout off and replaces random draws by their mean, while the model trains.

    Dropout is turned off as a layer, as a function and in attention. Random draws, such as those
    that drop paths and layers, become their mean, so they are the same for a record alone and in a
    batch. Permutations and random integers stay random, because a check must notice a model that
    shuffles records.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or compute the value that replaces its random result."""
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False))
            kwargs["dropout_p"] = 0.0
            return func(*args[:3], **kwargs)
        if func is F.multi_head_attention_forward:
            # In this function, ``training`` decides only whether dropout applies.
            kwargs["training"] = False
        if func is Tensor.bernoulli_:
            return _filled(args[0], args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if func in (torch.bernoulli, Tensor.bernoulli):
            return _filled(args[0].clone(), args[1] if len(args) > 1 else kwargs.get("p", args[0]))
        if func is Tensor.uniform_:
            low, high = (*args[1:], 0.0, 1.0)[:2] if len(args) != 2 else (args[1], 1.0)
            return _filled(args[0], (kwargs.get("from", low) + kwargs.get("to", high)) / 2)
        found = func(*args, **kwargs)
        return found.fill_(_MIDDLES[func]) if func in _MIDDLES else found


def _filled(tensor: Tensor, value: Tensor | float) -> Tensor:
    return tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)


@contextmanager
def same_randomness(seed: int) -> Iterator[None]:
    """Seed every generator that a model may draw from, and restore their states afterwards."""
    libraries = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model may draw from it
    try:
        with seeded(seed):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(libraries[0])
        np.random.set_state(libraries[1])  # noqa: NPY002
