"""FedSA-LoRA: A is shared, B stays with the client (arXiv 2410.01463)."""

from __future__ import annotations

from typing import ClassVar

from fedlora_flwr.plan import A
from fedlora_flwr.strategies.base import FedLoRA


class FedSALoRA(FedLoRA):
    """Train A and B, exchange and average A only; B and the head stay on each client's disk.

    The clients' models differ, and the server has none: after each round every client measures its
    own on the public test set, and the round's metrics are the means. B trains under the same noise
    as A although it stays, since the gradient of A reads it. A client without a B of its own starts
    from the backbone's head and B = 0. Source: arXiv 2410.01463.

    Examples
    --------
    >>> strategy = FedSALoRA()
    >>> strategy.shared, strategy.personal
    ('A', True)
    """

    paper: ClassVar[tuple[str, ...]] = (
        "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
        "2410.01463",
    )

    shared = A
