"""Gradient checkpointing: the backward pass computes activations again instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedlora_flwr.errors import InvalidValue, one_line
from fedlora_flwr.lora.adapters import AdaptedModel

_KINDS = ("gradient", "activation")
_METHOD = "gradient_checkpointing_enable"


def checkpoint_gradients(adapted: AdaptedModel) -> None:
    """Let a model keep only the inputs of its blocks, by the method of its own library.

    Gradients by record stay the same. Each block runs again in the backward pass, on the same
    inputs and with the same random numbers, and writes each gradient once. The blocks' output need
    not depend on their input: torch's variant without reentrance follows the graph itself.

    Parameters
    ----------
    adapted : AdaptedModel
        A transformers model, or a model around one, or a timm model.

    Raises
    ------
    InvalidValue
        The model cannot do it, or would do it only with its own dropout on.
    """
    base: Any = adapted.model.get_base_model()
    parts = _with(_METHOD, base)
    if not parts and not hasattr(base, "set_grad_checkpointing"):
        raise _refused("this model, which has no method for it")
    if parts and not adapted.backbone_dropout:
        raise _refused("a run with backbone-dropout = false: transformers needs training mode")
    try:
        _switch(base, parts, True)
    except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise _refused(f"this model ({one_line(error)})") from error
    adapted.recomputes = True


def _with(method: str, model: nn.Module) -> list[Any]:
    """Return the outermost modules that have a method."""
    found = [name for name, module in model.named_modules() if hasattr(module, method)]
    return [
        model.get_submodule(name)
        for name in found
        if not any(name != other and (not other or name.startswith(f"{other}.")) for other in found)
    ]


def _switch(base: Any, parts: list[Any], on: bool) -> None:
    if not parts:
        base.set_grad_checkpointing(on)
    for model in parts:
        if on and getattr(model.config, "use_cache", False):
            # A cache is for generation, and a block runs twice here.
            model.config.use_cache = False
        # Transformers has renamed the methods, and warns about the older names.
        old, new = (f"{kind}_checkpointing_{'enable' if on else 'disable'}" for kind in _KINDS)
        method = getattr(model, new if hasattr(model, new) else old)
        method(*([{"use_reentrant": False}] if on else []))
        if on and hasattr(model, "_require_grads_hook"):
            # The library lets embeddings require gradients, which only reentrant checkpoints need.
            # All frozen layers would then have a backward pass.
            model.disable_input_require_grads()


@contextmanager
def activations_kept(adapted: AdaptedModel) -> Iterator[None]:
    """Turn gradient checkpointing off for a while, for checks that replace random draws.

    Torch suspends such a replacement in the backward pass, so a block that runs again there would
    draw other numbers. A block computes the same function with and without checkpoints.
    """
    if not adapted.recomputes:
        yield
        return
    base: Any = adapted.model.get_base_model()
    parts = _with(_METHOD, base)
    _switch(base, parts, False)
    try:
        yield
    finally:
        _switch(base, parts, True)


def _refused(where: str) -> InvalidValue:
    return InvalidValue("gradient-checkpointing", True, f"false for {where}")
