"""Whole runs on a grid in this process, and what they leave behind."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fedlora_flwr.client_app import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid

SUMMARY = {
    "status",
    "task",
    "strategy",
    "num_clients",
    "num_rounds",
    "metric",
    "rounds_done",
    "end",
    "initial_accuracy",
    "final_accuracy",
    "best",
    "epsilon_max",
    "epsilon_budget",
    "delta",
    "accountant",
    "bytes_up",
    "bytes_up_adapters",
    "blocks",
    "bytes_down",
    "bytes_plain",
    "seconds",
    "failures",
    "robust",
    "suspects",
    "declined",
    "seed",
    "simulated",
    "reproducible_noise",
    "precision",
    "weighting",
    "trust_model",
    "remarks",
    "unprotected_metrics",
    "versions",
}


def run(config: RunConfig, folder: Path, **options: Any) -> tuple[RunDirectory, dict[str, Any]]:
    run_dir = RunDirectory(folder)
    with LocalGrid(app, config.num_clients, config.items()).running() as grid:
        return run_dir, run_federation(grid, config, run_dir, **options)


def adapter(run_dir: RunDirectory) -> dict[str, Any]:
    return dict(load_file(run_dir.adapter / "adapter_model.safetensors"))


def digests(folder: Path) -> dict[str, str]:
    """Return the content of every file below a folder, in short."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def only_run(parent: Path) -> Path:
    (found,) = (path for path in parent.iterdir() if not path.is_symlink())
    return found
