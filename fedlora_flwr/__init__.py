"""Differentially private federated fine-tuning with LoRA, on Flower.

The public API has four tiers: whole runs; strategies for a server; client and engine for private
training; and the building blocks of both. A name is imported when it is first used, so a server
that needs only strategies never loads torch.

Examples
--------
>>> from fedlora_flwr import RoLoRA
>>> RoLoRA(fraction_train=0.5, min_available_nodes=4).fraction_train
0.5
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedlora_flwr.errors import NotInstalled

# Public names are listed only here. `__init__.pyi`, for editors and type checkers, is generated
# from these tables by `_stub`.
RUNS: Mapping[str, str] = {
    "simulate": "simulations.simulate",
    "RunResult": "server.run_result",
    "load_runs": "server.run_result",
    "plan_run": "forecast.plan_run",
    "plan_budget": "forecast.plan_budget",
    "compare": "studies.comparing",
    "Compared": "studies.comparing",
    "audit_run": "audit.audit_run",
    "evaluate": "trained.evaluate",
    "Evaluation": "trained.evaluate",
    "sharpness": "trained.sharpness",
    "Sharpness": "trained.sharpness",
    "predict": "trained.predict",
    "merge": "trained.merge",
    "TableTask": "tasks.table_task",
}
STRATEGIES: Mapping[str, str] = {
    "FedLoRA": "strategies.base",
    "DPLoRA": "strategies.dp_lora",
    "FFALoRA": "strategies.ffa_lora",
    "FFASeeds": "strategies.ffa_seeds",
    "RoLoRA": "strategies.rolora",
    "LALoRA": "strategies.la_lora",
    "ASLoRA": "strategies.as_lora",
    "FedSVD": "strategies.fedsvd",
    "FlexLoRA": "strategies.flexlora",
    "FLoRA": "strategies.flora",
    "FedExLoRA": "strategies.fedex_lora",
    "FedSALoRA": "strategies.fedsa_lora",
    "MRMTL": "strategies.mr_mtl",
    "HeadOnly": "strategies.head_only",
    "LegacyStrategy": "integrations.legacy_strategy",
}
CLIENT_AND_ENGINE: Mapping[str, str] = {
    "LoRAClient": "clients.numpy_client",
    "LocalRound": "clients.local_round",
    "LocalTrainer": "clients.trainer",
    "answer_message": "clients.handler",
    "bridge": "clients.bridge",
    "client_identity": "clients.device",
    "follow_plan": "integrations.planned_loop",
    "follow_fit": "integrations.planned_loop",
    "PrivateEngine": "privacy.engine",
    "PrivateTrainer": "integrations.hf_trainer",
    "LocalGrid": "simulations.local_grid",
    "RunConfig": "config.run_config",
    "state_folder": "config.state",
    "strategy_of": "server.strategy",
}
BLOCKS: Mapping[str, str] = {
    "ComponentPlan": "plan",
    "AdaptedModel": "lora.adapters",
    "LoRASpec": "lora.adapters",
    "attach": "lora.adapters",
    "TensorRecords": "data.records",
    "Mechanism": "privacy.mechanism",
    "ClipWeights": "privacy.clip_weights",
    "OptimizerSettings": "privacy.postprocessing.optimizer",
    "SecureNoise": "privacy.noise",
    "SeededNoise": "privacy.noise",
    "Segment": "privacy.budget",
    "calibrate": "privacy.budget",
    "epsilon_spent": "privacy.budget",
    "rounds_within": "privacy.rounds_within",
    "Ledger": "privacy.ledger",
    "Account": "privacy.account",
    "Spent": "privacy.spent",
    "spent": "privacy.spent",
}
_HOMES = {**RUNS, **STRATEGIES, **CLIENT_AND_ENGINE, **BLOCKS}

try:
    __version__ = version("fedlora-flwr")
except PackageNotFoundError:  # The code runs from a bundle of the app, which is not installed.
    __version__ = "unknown"

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if missing := NotInstalled.of(error):
            raise missing from None
        raise


def __dir__() -> list[str]:
    return __all__


def _stub() -> str:
    """Return the text of ``__init__.pyi``."""
    tiers = {
        "Whole runs": RUNS,
        "Strategies": STRATEGIES,
        "Client and engine": CLIENT_AND_ENGINE,
        "Blocks": BLOCKS,
    }
    command = "python -c 'import fedlora_flwr; print(fedlora_flwr._stub())'"
    lines = [f"# Made of `__init__.py` by {command}"]
    for title, names in tiers.items():
        lines += ["", f"# {title}."]
        lines += [f"from fedlora_flwr.{home} import {n} as {n}" for n, home in names.items()]
    rest = ["", "__version__: str", "__all__: list[str]", "def _stub() -> str: ..."]
    return "\n".join([*lines, *rest])
