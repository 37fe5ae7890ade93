"""timm without W&B, which it would import for logs of its own training."""

from __future__ import annotations

from typing import Any

from fedlora_flwr.processes.later import later


def light_timm() -> Any:
    """Return the package timm."""
    with later("wandb"):
        import timm
    return timm
