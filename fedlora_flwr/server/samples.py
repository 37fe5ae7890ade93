"""``samples.json``: what the model wrote to a few public prompts, before training and last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.files import write_json
from fedlora_flwr.server.run_dir import SAMPLES, RunDirectory
from fedlora_flwr.tasks.answers import Answer, measured

if TYPE_CHECKING:
    from torch import nn

    from fedlora_flwr.tasks.registry import Task

MOST = 5
"""Prompts of which a run keeps the answers."""
LONGEST = 2_000
"""Characters of a text that a run keeps."""


def measure(
    config: RunConfig, task: Task, model: nn.Module, run_dir: RunDirectory, server_round: int
) -> dict[str, float]:
    """Measure a model on the public records, and keep a few of its answers if it writes any.

    Parameters
    ----------
    config : RunConfig
        The run; ``generation-limit`` says whether the model writes answers.
    task : Task
        Its task.
    model : nn.Module
        The model as it is after the round.
    run_dir : RunDirectory
        The run's folder.
    server_round : int
        The round, from 0.

    Returns
    -------
    dict[str, float]
        The round's metrics.
    """
    write = config.generation_limit > 0
    metrics, answers = measured(task, model, task.test_records(), write=write)
    if answers:
        keep_samples(run_dir, server_round, answers)
    return metrics


def keep_samples(run_dir: RunDirectory, server_round: int, answers: Sequence[Answer]) -> None:
    """Keep a few answers of a round in a run's folder, beside those of its first evaluation.

    Parameters
    ----------
    run_dir : RunDirectory
        The run's folder.
    server_round : int
        The round, from 0.
    answers : Sequence[Answer]
        What the model wrote, to the same records in each round.
    """
    path = run_dir.path / SAMPLES
    shown = answers[:MOST]
    now = {"round": server_round, "said": [_cut(one.said) for one in shown]}
    known: dict[str, Any] = {}
    if server_round and path.is_file():  # A run that was resumed has its first answers already.
        known = json.loads(path.read_text(encoding="utf-8"))
    asked = [
        {"prompt": _cut(one.prompt), "right": [_cut(text) for text in one.right]} for one in shown
    ]
    kept = {"answered": len(answers), "asked": asked, "first": known.get("first", now), "last": now}
    write_json(path, kept)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
