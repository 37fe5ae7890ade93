"""LA-LoRA: the factors take turns by local step (arXiv 2602.19926)."""

from __future__ import annotations

from typing import ClassVar

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA


class LALoRA(FedLoRA):
    """Train B in odd local steps and A in even ones; average each factor on its own.

    Within a step one factor is frozen, so noise on both never multiplies; the average at the
    round's end is not exact. B is first: while B = 0 the gradient of A is zero. The method's
    low-pass filter is the client's ``filter = "binomial"``. Under a secure sum a round has one
    step, and the factors take turns by round. Source: arXiv 2602.19926.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> [str(LALoRA().plan(number, layout)) for number in (1, 2, 3)]
    ['B/A', 'B/A', 'B/A']
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Rethinking LoRA for Privacy-Preserving Federated Learning in Large Models",
        "2602.19926",
    )

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Alternate B and A over the local steps, in every block; by round under a secure sum."""
        if self.by_sum:
            return ComponentPlan.uniform(B if server_round % 2 else A)
        return ComponentPlan.uniform(B, A)
