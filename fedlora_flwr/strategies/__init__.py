"""Methods as Flower strategies, by name."""

from __future__ import annotations

from fedlora_flwr.errors import unknown
from fedlora_flwr.strategies.as_lora import ASLoRA
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.dp_lora import DPLoRA
from fedlora_flwr.strategies.fedex_lora import FedExLoRA
from fedlora_flwr.strategies.fedsa_lora import FedSALoRA
from fedlora_flwr.strategies.fedsvd import FedSVD
from fedlora_flwr.strategies.ffa_lora import FFALoRA
from fedlora_flwr.strategies.flexlora import FlexLoRA
from fedlora_flwr.strategies.flora import FLoRA
from fedlora_flwr.strategies.la_lora import LALoRA
from fedlora_flwr.strategies.replies import RoundReport, Upload
from fedlora_flwr.strategies.rolora import RoLoRA

STRATEGIES: dict[str, type[FedLoRA]] = {
    "dp-lora": DPLoRA,
    "ffa-lora": FFALoRA,
    "rolora": RoLoRA,
    "la-lora": LALoRA,
    "as-lora": ASLoRA,
    "fedsvd": FedSVD,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "fedex-lora": FedExLoRA,
    "fedsa-lora": FedSALoRA,
}


def strategy_class(name: str) -> type[FedLoRA]:
    """Return the strategy called ``name``.

    Raises
    ------
    InvalidValue
        No strategy has that name.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name]


__all__ = [
    "STRATEGIES",
    "ASLoRA",
    "DPLoRA",
    "FFALoRA",
    "FLoRA",
    "FedExLoRA",
    "FedLoRA",
    "FedSALoRA",
    "FedSVD",
    "FlexLoRA",
    "LALoRA",
    "RoLoRA",
    "RoundReport",
    "Upload",
    "strategy_class",
]
