"""Gradient checkpointing: the backward pass computes activations again instead of keeping them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedlora_flwr.errors import InvalidValue, one_line
from fedlora_flwr.lora.adapters import AdaptedModel


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
    parts = _with("gradient_checkpointing_enable", base)
    if not parts and not hasattr(base, "set_grad_checkpointing"):
        raise _refused("this model, which has no method for it")
    if parts and not adapted.backbone_dropout:
        raise _refused("a run with backbone-dropout = false: transformers needs training mode")
    try:
        for part in parts:
            _enable(part)
        if not parts:
            base.set_grad_checkpointing(True)
    except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise _refused(f"this model ({one_line(error)})") from error


def _with(method: str, model: nn.Module) -> list[Any]:
    """Return the outermost modules that have a method."""
    found = [name for name, module in model.named_modules() if hasattr(module, method)]
    return [
        model.get_submodule(name)
        for name in found
        if not any(name != other and (not other or name.startswith(f"{other}.")) for other in found)
    ]


def _enable(model: Any) -> None:
    # Transformers has renamed the method, and warns about the older name.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
        # The library lets embeddings require gradients, which only reentrant checkpoints need.
        # All frozen layers would then have a backward pass.
        model.disable_input_require_grads()


def _refused(where: str) -> InvalidValue:
    return InvalidValue("gradient-checkpointing", True, f"false for {where}")
