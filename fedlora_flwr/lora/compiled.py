"""The frozen backbone through torch.compile; layers with gradients by record stay as they are."""

from __future__ import annotations

import torch

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import AdaptedModel


def compile_backbone(adapted: AdaptedModel, backend: str) -> None:
    """Let torch compile what lies between the adapted layers of a model.

    An adapted layer writes each record's gradient beside the parameter, which no compiled graph may
    do: it stays out, and the graph is cut there. Batches differ in size, so shapes are dynamic. A
    first pass compiles, for a minute or more, and a batch of one compiles once more.

    Parameters
    ----------
    adapted : AdaptedModel
        A model that a `PrivateEngine` has been built on.
    backend : str
        A backend of `torch.compile`.

    Raises
    ------
    InvalidValue
        torch cannot compile with it on this machine, for want of a compiler as a rule.
    """
    device = next(iter(adapted.parameters.values())).device
    try:
        torch.compile(_probe, backend=backend, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # torch has many, and none in common.
        reason = str(error).strip().splitlines()[0]
        allowed = f"'none': torch cannot compile for {device.type} on this machine ({reason})"
        raise InvalidValue("compile", backend, allowed) from error
    modules = [layer.module for layer in adapted.layers] + [part.module for part in adapted.head]
    for module in modules:
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
    adapted.model.get_base_model().compile(backend=backend, dynamic=True)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1
