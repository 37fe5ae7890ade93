"""FFA-LoRA: only B trains (arXiv 2403.12313)."""

from __future__ import annotations

from typing import ClassVar

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA


class FFALoRA(FedLoRA):
    """Freeze A at its shared random start and train B, so that the mean of B is exact.

    ``mean(B_k) A = mean(B_k A)`` because every client holds the same A, which comes from the
    server. Uploads are half of DP-LoRA's. Source: arXiv 2403.12313.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> [str(FFALoRA().plan(number, layout)) for number in (1, 2, 3)]
    ['B', 'B', 'B']
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Improving LoRA in Privacy-preserving Federated Learning",
        "2403.12313",
    )

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Train B in every block at every step."""
        return ComponentPlan.uniform(B)
