"""Adapter folders as a run leaves them, made without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.tasks.registry import Task, build_task, class_names
from fedlora_flwr.trained.saved_task import write_task
from tests.tasks.texts import fill


def exported(config: RunConfig, folder: Path) -> tuple[Any, AdaptedModel]:
    """Export an adapter with random values; return its task and the model that it came from."""
    task: Task = build_task(config.task, config)
    adapted = build_adapted(config, task)
    fill(adapted)
    adapted.export(folder)
    write_task(folder, config, class_names(task))
    return task, adapted
