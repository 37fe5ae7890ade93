"""The run, node and task for which this process acts; Flower needs them to make messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from fedlora_flwr.flower_internals import TaskIdentity

Identity: TypeAlias = tuple[int, int, int]
"""Flower's ids of a run, a node and a task."""


def current() -> Identity:
    """Return the run, node and task for which this process acts.

    Raises
    ------
    RuntimeError
        No run has been assigned to this process.
    """
    return TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id


@contextmanager
def acting_for(run_id: int, node_id: int = 1, task_id: int = 1) -> Iterator[None]:
    """Let this process act for a node of a run, and restore its former identity afterwards."""
    before = {name: vars(TaskIdentity)[name] for name in ("_run_id", "_node_id", "_task_id")}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
