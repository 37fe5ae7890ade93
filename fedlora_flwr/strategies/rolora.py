"""RoLoRA: the factors take turns by round (arXiv 2502.01755)."""

from __future__ import annotations

from typing import ClassVar

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA


class RoLoRA(FedLoRA):
    """Train B in odd rounds and A in even ones, so that every mean is exact and both learn.

    B is first: while B = 0 the gradient of A is zero, and a private step on A would be pure noise.
    Uploads are half of DP-LoRA's. Source: arXiv 2502.01755.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> [str(RoLoRA().plan(number, layout)) for number in (1, 2, 3)]
    ['B', 'A', 'B']
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
        "2502.01755",
    )

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Train one factor in every block."""
        return ComponentPlan.uniform(B if server_round % 2 else A)
