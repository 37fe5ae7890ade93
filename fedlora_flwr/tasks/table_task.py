"""A task made of objects: a torch module, and tables of private and of public records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.given import as_frame
from fedlora_flwr.data.partition import client_values, partition_records
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.data.records import Batch, Records, TensorRecords
from fedlora_flwr.data.splits import Split
from fedlora_flwr.data.users import units_by_client, users_in
from fedlora_flwr.errors import InvalidValue, one_line, unknown
from fedlora_flwr.tasks.evaluation import class_predictions, evaluate_classifier, scores_of

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from fedlora_flwr.data.given import Table

Inputs: TypeAlias = "Callable[[pd.DataFrame], Tensor]"


@dataclass(frozen=True, eq=False)
class TableTask:
    """Classify the rows of a table with a torch module of your own.

    Give one to `fedlora_flwr.simulate` as ``task``. A recipe names one in a module as
    ``module:name``, and then it works on other processes too.

    Parameters
    ----------
    model : nn.Module
        Maps inputs of shape (n, …) to scores of the classes, shape (n, classes). Its weights are
        where the training starts; the module itself does not change.
    train, test : DataFrame or Dataset
        The private records, which are dealt out to the clients, and the public ones.
    label : str (default: "label")
        Column with the class.
    lora_targets : str
        Regular expression. A linear layer gets an adapter if its whole name matches.
    head : tuple[str, ...] (default: ())
        Names of linear layers that train in full.
    columns : Sequence[str] (default: all but the label and ``user-column``)
        Columns of numbers that the model reads, in this order.
    inputs : callable, optional
        Makes the model's inputs of a DataFrame: a tensor whose first axis is the row. By default
        the columns as fp32, shape (n, columns).
    classes : Sequence (default: those in both tables, sorted)
        Values of the label in the order of the model's scores.
    name, metric : str
        What the task and its figure are called.

    Raises
    ------
    InvalidValue
        A table lacks a column, or a record has no class or an unknown one.

    Examples
    --------
    >>> import pandas as pd
    >>> from fedlora_flwr import RunConfig
    >>> frame = pd.DataFrame({"x": [0.0, 1.0, 2.0], "label": ["a", "b", "b"]})
    >>> task = TableTask(nn.Linear(1, 2), train=frame, test=frame, lora_targets="")(RunConfig())
    >>> task.class_names(), task.test_records().batch(torch.tensor([1]))["label"].tolist()
    (('a', 'b'), [1])
    """

    model: nn.Module
    train: Table
    test: Table
    label: str = "label"
    lora_targets: str = ""
    head: tuple[str, ...] = ()
    columns: Sequence[str] = ()
    inputs: Inputs | None = None
    classes: Sequence[Any] = field(default=())
    name: str = "table"
    metric: str = "accuracy"

    def __call__(self, settings: RunConfig) -> TableClassifier:
        """Return the task under a run's settings."""
        return TableClassifier(self, settings)


class TableClassifier:
    """The task that a `TableTask` makes.

    Batches are ``{"x": (n, …), "label": (n,) int64}``.

    Parameters
    ----------
    table : TableTask
        Model and records.
    settings : RunConfig
        The run; its keys under ``[partition]`` tell how clients share the records.

    Raises
    ------
    InvalidValue
        See `TableTask`.
    """

    def __init__(self, table: TableTask, settings: RunConfig) -> None:
        self._table, self._settings = table, settings
        self.name, self.metric = table.name, table.metric
        self.lora_targets, self.head = table.lora_targets, tuple(table.head)
        self._train = as_frame(table.train, "train")
        self._test = as_frame(table.test, "test")
        self._dealt: dict[int, Parts] = {}
        self._private = self._with_classes(self._train, "train")
        self._private.users = users_in(self._train, settings.user_column)
        self._public = self._with_classes(self._test, "test")

    def build_model(self) -> nn.Module:
        """Return a copy of the model, on the CPU in fp32."""
        return copy.deepcopy(self._table.model).to("cpu", torch.float32)

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        """Return the private records of one client.

        Raises
        ------
        InvalidValue
            There is no such client, or the records cannot be partitioned as configured.
        """
        parts = self._parts(num_partitions)
        if not 0 <= partition_id < len(parts):
            raise InvalidValue("partition-id", partition_id, f"0 to {len(parts) - 1}")
        part, users = parts[partition_id], self._private.users
        own = None if users is None else users[part]
        return TensorRecords(self._private.batch(torch.from_numpy(part)), users=own)

    def test_records(self) -> Records:
        """Return the public records."""
        return self._public

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of each record, shape (n,)."""
        return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Return mean ``loss`` and ``accuracy``."""
        size = self._settings.eval_batch_size
        return evaluate_classifier(model, records, lambda batch: model(batch["x"]), size)

    def scores(self, model: nn.Module, records: Records) -> Tensor:
        """Return each record's scores, shape (n, classes), fp64."""
        size = self._settings.eval_batch_size
        return scores_of(model, records, lambda batch: model(batch["x"]), size)

    def predictions(self, model: nn.Module, dataset: Dataset) -> Mapping[str, Sequence[Any]]:
        """Return the class of each record with its probability.

        Raises
        ------
        InvalidValue
            A column is missing.
        """
        records = TensorRecords({"x": self._inputs(as_frame(dataset, "data"), "data")})
        return class_predictions(self.scores(model, records), self.class_names())

    def labeled(self, dataset: Dataset) -> Records:
        """Return a data set's records with their classes.

        Raises
        ------
        InvalidValue
            A column is missing, or a class is unknown.
        """
        return self._with_classes(as_frame(dataset, "data"), "data")

    def class_names(self) -> tuple[str, ...]:
        """Return the classes as text, in the order of the model's scores."""
        return tuple(map(str, self._classes))

    @cached_property
    def _classes(self) -> list[Any]:
        table = self._table
        if table.classes:
            return list(table.classes)
        for name, frame in (("train", self._train), ("test", self._test)):
            self._check(frame, name, [table.label])
        held = {*self._train[table.label].dropna(), *self._test[table.label].dropna()}
        return sorted(held)

    def _with_classes(self, frame: pd.DataFrame, name: str) -> TensorRecords:
        label = self._table.label
        self._check(frame, name, [label])
        numbers = {value: number for number, value in enumerate(self._classes)}
        others = [value for value in frame[label].unique() if value not in numbers]
        if others:
            allowed = f"a column of {self._classes}, but table {name!r} also holds {others}"
            raise InvalidValue("label", label, allowed)
        labels = torch.tensor([numbers[value] for value in frame[label]], dtype=torch.int64)
        return TensorRecords({"x": self._inputs(frame, name), "label": labels})

    def _inputs(self, frame: pd.DataFrame, name: str) -> Tensor:
        table = self._table
        if table.inputs is not None:
            made = table.inputs(frame)
            if not isinstance(made, Tensor) or len(made) != len(frame):
                kind = f"a {type(made).__name__}"
                allowed = f"a function that returns a tensor with a row for each of {len(frame)}"
                raise InvalidValue("inputs", kind, allowed)
            return made
        columns = self._columns
        self._check(frame, name, columns)
        try:
            return torch.from_numpy(frame[columns].to_numpy(dtype=np.float32).copy())
        except (TypeError, ValueError) as error:
            allowed = f"columns of numbers in table {name!r} ({one_line(error)}), or set inputs"
            raise InvalidValue("columns", columns, allowed) from error

    @property
    def _columns(self) -> list[str]:
        own, others = list(self._table.columns), (self._table.label, self._settings.user_column)
        return own or [name for name in self._train.columns if name not in others]

    def _check(self, frame: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
        for column in columns:
            if column not in frame.columns:
                key = "label" if column == self._table.label else "columns"
                raise unknown(key, column, frame.columns, after=f", the columns of table {name!r}")

    def client_units(self, num_partitions: int) -> NDArray[np.int64]:
        """Return the number of records, or of users, of each client, shape (num_partitions,)."""
        parts = self._parts(num_partitions)
        return units_by_client(self._settings.unit, parts, self._private.users)

    def client_values(self, num_partitions: int) -> list[str]:
        """Return the value of the partition column that each client is made of, if it is of one."""
        return client_values(*self._to_deal(num_partitions))

    def _parts(self, num_partitions: int) -> Parts:
        found = self._dealt.get(num_partitions)
        if found is None:
            found = partition_records(*self._to_deal(num_partitions))
            self._dealt[num_partitions] = found
        return found

    def _to_deal(self, num_partitions: int) -> tuple[dict[str, Any], Split]:
        """Return the columns by which clients can share the records, and how they do."""
        split = Split.of(self._settings, num_partitions, self._settings.seed)
        labels = self._private.batch(torch.arange(len(self._private)))["label"].numpy()
        own = {n: self._train[n].to_numpy() for n in self._train.columns if n == split.column}
        return {"row": np.arange(len(labels)), **own, "label": labels}, split
