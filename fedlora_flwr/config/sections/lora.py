"""``[lora]``: the LoRA adapters and the head."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.config.keys import ANY, FLAG, QUICK_PATTERN, Decider, between, choice, key

_LIMITED, _RUN, _PACKAGE = Decider.LIMITED, Decider.RUN, Decider.PACKAGE


@dataclass(frozen=True)
class LoRASection:
    """The LoRA adapters and the head."""

    rank: int = key(
        4, between(1, 4_096), "LoRA rank r",
        _LIMITED, "All coordinates are clipped together; it costs memory and time.",
    )  # fmt: skip
    client_ranks: str = key(
        "", ANY, "flexlora: ranks of simulated clients, repeated in order, e.g. '2,4,8'; empty = "
        "rank for all",
        _PACKAGE, "It gives ranks to the partitions of a simulation.",
    )  # fmt: skip
    lora_alpha: float = key(
        8.0, between(1e-3, 1e5), "LoRA scaling is lora-alpha / rank",
        _LIMITED, "It scales gradients before they are clipped.",
    )  # fmt: skip
    lora_dropout: float = key(
        0.0, between(0, 0.999), "dropout on the adapters' inputs",
        _RUN, "Its masks come from the device's own secret generator.",
    )  # fmt: skip
    backbone_dropout: bool = key(
        True, FLAG, "whether the backbone's own dropout is on in training",
        _RUN, "Its masks come from the device's own secret generator.",
    )  # fmt: skip
    lora_init: str = key(
        "random", choice("random", "pissa", "olora"),
        "start of the adapters: a random A and B = 0; or factors of each frozen weight, by its "
        "largest singular values (pissa) or its QR decomposition (olora)",
        _RUN, "Only the server reads it, and sends its arrays.",
    )  # fmt: skip
    lora_targets: str = key(
        "", ANY, "pattern of adapted module names; empty = the task's",
        _LIMITED, "All adapted layers are clipped together; a slow pattern might never end.",
        device_check=QUICK_PATTERN,
    )  # fmt: skip
    rslora: bool = key(
        False, FLAG, "scale by lora-alpha / sqrt(rank)",
        _RUN, "It scales gradients before they are clipped.",
    )  # fmt: skip
    train_head: bool = key(
        True, FLAG, "train the task head in full",
        _RUN, "The head is clipped together with the adapters.",
    )  # fmt: skip
