"""Methods as Flower strategies, by name."""

from __future__ import annotations

from dataclasses import fields

from fedlora_flwr import places
from fedlora_flwr.config.keys import FLAG, above, at_least, between, choice
from fedlora_flwr.config.sections import SECTIONS
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import load_strategy
from fedlora_flwr.strategies.as_lora import ASLoRA
from fedlora_flwr.strategies.base import FedLoRA
from fedlora_flwr.strategies.declared import setting
from fedlora_flwr.strategies.dp_lora import DPLoRA
from fedlora_flwr.strategies.fedex_lora import FedExLoRA
from fedlora_flwr.strategies.fedsa_lora import FedSALoRA
from fedlora_flwr.strategies.fedsvd import FedSVD
from fedlora_flwr.strategies.ffa_lora import FFALoRA
from fedlora_flwr.strategies.ffa_seeds import FFASeeds
from fedlora_flwr.strategies.flexlora import FlexLoRA
from fedlora_flwr.strategies.flora import FLoRA
from fedlora_flwr.strategies.head_only import HeadOnly
from fedlora_flwr.strategies.la_lora import LALoRA
from fedlora_flwr.strategies.mr_mtl import MRMTL
from fedlora_flwr.strategies.replies import RoundReport, Upload
from fedlora_flwr.strategies.rolora import RoLoRA

STRATEGIES: dict[str, type[FedLoRA]] = {name: load_strategy(name) for name in places.STRATEGIES}
"""The built-in strategies by name."""


def strategy_class(name: str) -> type[FedLoRA]:
    """Return the strategy called ``name``: built in, of an installed package, or module:Class.

    Raises
    ------
    InvalidValue
        No strategy has that name, or the name is not that of a usable subclass of `FedLoRA`.
    """
    found = load_strategy(name)
    if not isinstance(found, type) or not issubclass(found, FedLoRA):
        allowed = "the name of a strategy, or module:Class of a subclass of FedLoRA"
        raise InvalidValue("strategy", name, allowed)
    if fields(found.settings) and not found.name:
        raise InvalidValue(
            "strategy", name, "a class with a name, which its settings need. Set `name` in it"
        )
    if SECTIONS.get(found.name, found.settings) is not found.settings:
        allowed = "a class with a name that no other settings have. Set `name` to another text"
        raise InvalidValue("strategy", name, f"{allowed} than {found.name!r}")
    return found


__all__ = [
    "FLAG",
    "MRMTL",
    "STRATEGIES",
    "ASLoRA",
    "DPLoRA",
    "FFALoRA",
    "FFASeeds",
    "FLoRA",
    "FedExLoRA",
    "FedLoRA",
    "FedSALoRA",
    "FedSVD",
    "FlexLoRA",
    "HeadOnly",
    "LALoRA",
    "RoLoRA",
    "RoundReport",
    "Upload",
    "above",
    "at_least",
    "between",
    "choice",
    "setting",
    "strategy_class",
]
