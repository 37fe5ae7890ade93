"""torch.compile for the frozen backbone; layers with per-record gradients are not compiled."""

from __future__ import annotations

import torch

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import AdaptedModel


def compile_backbone(adapted: AdaptedModel, backend: str) -> None:
    """Let torch compile the parts of a model between its adapted layers.

    An adapted layer stores per-record gradients on its parameters, which a compiled graph cannot
    do. The layer therefore stays out, and the graph is cut at it. Batches differ in size, so shapes
    are dynamic. The first pass compiles for a minute or more; the first batch of one record
    compiles again.

    Parameters
    ----------
    adapted : AdaptedModel
        A model on which a `PrivateEngine` has been built.
    backend : str
        A backend of `torch.compile`.

    Raises
    ------
    InvalidValue
        torch cannot compile with this backend on this machine, usually because there is no
        compiler.
    """
    device = next(iter(adapted.parameters.values())).device
    try:
        torch.compile(_probe, backend=backend, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # torch raises many types, which have no other common base class.
        reason = str(error).strip().splitlines()[0]
        allowed = f"'none': torch cannot compile for {device.type} on this machine ({reason})"
        raise InvalidValue("compile", backend, allowed) from error
    modules = [layer.module for layer in adapted.layers] + [part.module for part in adapted.head]
    for module in modules:
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
    adapted.model.get_base_model().compile(backend=backend, dynamic=True)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1
