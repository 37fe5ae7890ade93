"""DP-LoRA: both factors train and are averaged (arXiv 2312.17493)."""

from __future__ import annotations

from typing import ClassVar

from fedlora_flwr.strategies.base import FedLoRA


class DPLoRA(FedLoRA):
    """Train A and B at every step and average each on its own: the baseline.

    The mean of the products differs from the product of the means, and noise on both factors
    multiplies. It is what `FedLoRA` does where a method overrides nothing. Source: arXiv
    2312.17493.

    Examples
    --------
    >>> from fedlora_flwr.layout import Layout
    >>> layout = Layout(("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"))
    >>> [str(DPLoRA().plan(number, layout)) for number in (1, 2, 3)]
    ['*', '*', '*']
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Differentially Private Low-Rank Adaptation of Large Language Model Using Federated "
        "Learning",
        "2312.17493",
    )
