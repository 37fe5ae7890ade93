"""Tasks by name: what is learnt, from which records, on which backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fedlora_flwr.errors import InvalidValue, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]


class Records(Protocol):
    """Labelled records that can be read by position."""

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def batch(self, indices: Tensor) -> Batch:
        """Return the records at ``indices``.

        Parameters
        ----------
        indices : Tensor
            Positions, int64, shape (n,).

        Returns
        -------
        Batch
            Tensors whose first axis is the record, n long.
        """
        ...


class Task(Protocol):
    """One learning problem: backbone, public test set, private records, loss."""

    name: str
    metric: str
    """Name of the figure that `evaluate` returns and that a run reports."""
    lora_targets: str
    """Default regular expression for the module names that get an adapter."""
    head: tuple[str, ...]
    """Names of the modules that form the task head."""

    def build_model(self) -> nn.Module:
        """Return a new pretrained model, head included, on the CPU in fp32.

        The same call gives bit-identical weights in every process.
        """
        ...

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        """Return the private records of one simulated client."""
        ...

    def test_records(self) -> Records:
        """Return the public test set that the server evaluates on."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each record, shape (n,); record i's reads record i only."""
        ...

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Return metrics on ``records``: at least ``loss`` and the task's ``metric``."""
        ...


TaskFactory = Callable[[Mapping[str, Any]], Task]
_FACTORIES: dict[str, str] = {
    "digits": "fedlora_flwr.tasks.digits:DigitsTask",
}


def task_names() -> list[str]:
    """Return the registered task names, sorted."""
    return sorted(_FACTORIES)


def build_task(name: str, settings: Any) -> Task:
    """Build the task called ``name``.

    Parameters
    ----------
    name : str
        A registered name.
    settings : TaskConfig
        The task's part of the run configuration.

    Raises
    ------
    InvalidValue
        No task has that name.
    """
    import importlib

    if name not in _FACTORIES:
        raise InvalidValue("task", name, one_of(_FACTORIES, name))
    module, attribute = _FACTORIES[name].split(":")
    task: Task = getattr(importlib.import_module(module), attribute)(settings)
    return task
