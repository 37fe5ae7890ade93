"""Differentially private federated fine-tuning with LoRA, on Flower.

The public API; names are imported when first used, so that strategies alone never load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora_flwr.clients.bridge import bridge as bridge
    from fedlora_flwr.clients.device import client_identity as client_identity
    from fedlora_flwr.clients.handler import answer_message as answer_message
    from fedlora_flwr.clients.local_round import LocalRound as LocalRound
    from fedlora_flwr.clients.numpy_client import LoRAClient as LoRAClient
    from fedlora_flwr.clients.trainer import LocalTrainer as LocalTrainer
    from fedlora_flwr.config import RunConfig as RunConfig
    from fedlora_flwr.data.records import TensorRecords as TensorRecords
    from fedlora_flwr.integrations.hf_trainer import PrivateTrainer as PrivateTrainer
    from fedlora_flwr.integrations.legacy_strategy import LegacyStrategy as LegacyStrategy
    from fedlora_flwr.integrations.planned_loop import follow_fit as follow_fit
    from fedlora_flwr.integrations.planned_loop import follow_plan as follow_plan
    from fedlora_flwr.lora.adapters import AdaptedModel as AdaptedModel
    from fedlora_flwr.lora.adapters import LoRASpec as LoRASpec
    from fedlora_flwr.lora.adapters import attach as attach
    from fedlora_flwr.plan import ComponentPlan as ComponentPlan
    from fedlora_flwr.privacy.budget import calibrate as calibrate
    from fedlora_flwr.privacy.budget import epsilon_spent as epsilon_spent
    from fedlora_flwr.privacy.engine import PrivateEngine as PrivateEngine
    from fedlora_flwr.privacy.ledger import Ledger as Ledger
    from fedlora_flwr.privacy.mechanism import Mechanism as Mechanism
    from fedlora_flwr.simulations.local_grid import LocalGrid as LocalGrid
    from fedlora_flwr.strategies import ASLoRA as ASLoRA
    from fedlora_flwr.strategies import DPLoRA as DPLoRA
    from fedlora_flwr.strategies import FedExLoRA as FedExLoRA
    from fedlora_flwr.strategies import FedLoRA as FedLoRA
    from fedlora_flwr.strategies import FedSALoRA as FedSALoRA
    from fedlora_flwr.strategies import FedSVD as FedSVD
    from fedlora_flwr.strategies import FFALoRA as FFALoRA
    from fedlora_flwr.strategies import FlexLoRA as FlexLoRA
    from fedlora_flwr.strategies import FLoRA as FLoRA
    from fedlora_flwr.strategies import LALoRA as LALoRA
    from fedlora_flwr.strategies import RoLoRA as RoLoRA

_HOMES = {
    "AdaptedModel": "lora.adapters",
    "LoRASpec": "lora.adapters",
    "attach": "lora.adapters",
    "bridge": "clients.bridge",
    "client_identity": "clients.device",
    "answer_message": "clients.handler",
    "LocalRound": "clients.local_round",
    "LoRAClient": "clients.numpy_client",
    "follow_fit": "integrations.planned_loop",
    "follow_plan": "integrations.planned_loop",
    "LocalTrainer": "clients.trainer",
    "RunConfig": "config",
    "ComponentPlan": "plan",
    "calibrate": "privacy.budget",
    "epsilon_spent": "privacy.budget",
    "Mechanism": "privacy.mechanism",
    "PrivateEngine": "privacy.engine",
    "Ledger": "privacy.ledger",
    "PrivateTrainer": "integrations.hf_trainer",
    "LocalGrid": "simulations.local_grid",
    "ASLoRA": "strategies",
    "DPLoRA": "strategies",
    "FedExLoRA": "strategies",
    "FedSALoRA": "strategies",
    "FedSVD": "strategies",
    "FlexLoRA": "strategies",
    "FLoRA": "strategies",
    "FedLoRA": "strategies",
    "FFALoRA": "strategies",
    "LALoRA": "strategies",
    "RoLoRA": "strategies",
    "LegacyStrategy": "integrations.legacy_strategy",
    "TensorRecords": "data.records",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
