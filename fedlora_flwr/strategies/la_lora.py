"""LA-LoRA: the factors take turns by local step (arXiv 2602.19926)."""

from __future__ import annotations

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA


class LALoRA(FedLoRA):
    """Train B in odd local steps and A in even ones; average each factor on its own.

    Within a step one factor is frozen, so noise on both never multiplies; the average at the
    round's end is not exact. B is first: while B = 0 the gradient of A is zero. The method's
    low-pass filter is the client's ``filter = "binomial"``. With one local step per round the turns
    go on from round to round. Source: arXiv 2602.19926.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> [str(LALoRA().plan(number, layout)) for number in (1, 2, 3)]
    ['B/A', 'B/A', 'B/A']
    """

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Alternate B and A over the local steps, in every block; over rounds of one step each."""
        del layout
        if self.local_steps == 1:
            return ComponentPlan.uniform(B if server_round % 2 else A)
        return ComponentPlan.uniform(B, A)
