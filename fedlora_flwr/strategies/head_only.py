"""The head alone trains: the baseline that a method with adapters has to beat."""

from __future__ import annotations

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import NEITHER, ComponentPlan
from fedlora_flwr.strategies.base import FedLoRA


class HeadOnly(FedLoRA):
    """Train the head, and leave every adapter where the server drew it.

    The adapters have B = 0, so the frozen model stays what it is. The clip norm and the noise are
    the head's alone. A task whose head does not train has nothing to learn, and is refused.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(
    ...     ("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight", "head.weight")
    ... )
    >>> [str(HeadOnly().plan(number, layout)) for number in (1, 2, 3)]
    ['-', '-', '-']
    >>> layout.active(HeadOnly().plan(1, layout), step=1)
    ('head.weight',)
    """

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Train no factor in any block."""
        return ComponentPlan.uniform(NEITHER)
