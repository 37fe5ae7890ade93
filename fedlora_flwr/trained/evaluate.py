"""``fedlora evaluate``: an adapter's figures on labeled records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora_flwr.data.records import Records, labels_of
from fedlora_flwr.errors import InvalidValue, explained, require
from fedlora_flwr.tasks.answers import measured
from fedlora_flwr.tasks.dataset_task import DatasetTask
from fedlora_flwr.tasks.registry import class_names, optional
from fedlora_flwr.trained.opened import NO_DATA, Adapter, OpenAdapter, opened

if TYPE_CHECKING:
    import pandas as pd

    from fedlora_flwr.data.given import Table
    from fedlora_flwr.tasks.registry import Task, TaskFactory


@dataclass(frozen=True)
class Evaluation:
    """Figures of an adapter on labeled records.

    Parameters
    ----------
    adapter : Path
        The adapter's folder.
    task : str
        The task.
    records : int
        Records that were measured.
    metrics : Mapping[str, float]
        The task's figures: ``loss``, its metric and others.
    classes : Sequence[str] (default: none)
        Names of the classes; none if the task has none.
    counts : Sequence[Sequence[int]] (default: none)
        Confusion matrix: records of the class of the row that were taken for that of the column.

    Examples
    --------
    >>> counts = [[3, 1], [0, 4]]
    >>> found = Evaluation(Path("adapter"), "digits", 8, {"accuracy": 0.875}, ["a", "b"], counts)
    >>> found.by_class["precision"].tolist(), found.by_class["recall"].tolist()
    ([1.0, 0.8], [0.75, 1.0])
    """

    adapter: Path
    task: str
    records: int
    metrics: Mapping[str, float]
    classes: Sequence[str] = ()
    counts: Sequence[Sequence[int]] = ()

    @property
    def confusion(self) -> pd.DataFrame:
        """The confusion matrix: a row per class, a column per prediction."""
        import pandas as pd

        names = list(self.classes)
        rows = pd.Index(names, name="class")
        return pd.DataFrame(
            [list(row) for row in self.counts],
            index=rows,
            columns=pd.Index(names, name="prediction"),
        )

    @property
    def by_class(self) -> pd.DataFrame:
        """One row per class: records, precision, recall and F1, each in [0, 1].

        A figure that would divide by 0 is NaN.
        """
        import pandas as pd

        return pd.DataFrame(self._rows()).set_index("class") if self.counts else pd.DataFrame()

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora evaluate --json`` prints."""
        return {
            "adapter": str(self.adapter),
            "task": self.task,
            "records": self.records,
            "metrics": dict(self.metrics),
            "classes": self._rows(),
            "confusion": [list(row) for row in self.counts],
        }

    def _rows(self) -> list[dict[str, Any]]:
        found = []
        for number, name in enumerate(self.classes if self.counts else ()):
            hits, there = self.counts[number][number], sum(self.counts[number])
            taken = sum(row[number] for row in self.counts)
            figures = {
                "precision": _share(hits, taken),
                "recall": _share(hits, there),
                "f1": _share(2 * hits, taken + there),
            }
            found.append({"class": name, "records": there, **figures})
        return found


def evaluate(
    adapter: Adapter,
    data: str | Path | Table | None = None,
    *,
    task: str | Task | TaskFactory | None = None,
    **changes: Any,
) -> Evaluation:
    """Measure an adapter on labeled records, as ``fedlora evaluate`` does.

    Parameters
    ----------
    adapter : str, Path or RunResult
        A run's folder, an adapter's folder, or the result of a run.
    data : str, Path, DataFrame or Dataset, optional
        A file, a folder, or a table; by default the run's own public records.
    task : str, Task or callable, optional
        The task's name or object, if it is not the run's.
    **changes : Any
        Settings by key that replace those of the run, such as ``label_column="verdict"``.

    Raises
    ------
    InvalidValue
        The folder holds no adapter, the records lack a column or have an unknown class, or the task
        reads no such records.

    Examples
    --------
    >>> import tempfile
    >>> from fedlora_flwr import simulate
    >>> folder = tempfile.mkdtemp()
    >>> result = simulate("digits", num_clients=2, num_rounds=1, local_steps=1, output=folder)
    >>> found = evaluate(result)
    >>> found.records, found.metrics["accuracy"] == result.summary["final_accuracy"]
    (360, True)
    """
    require("client")
    with opened(adapter, data, task, changes) as found:
        records = labeled_records(found)
        own = found.task
        with explained("Measuring the adapter", "Set a smaller eval-batch-size."):
            write = found.config.generation_limit > 0
            metrics, _ = measured(own, found.model, records, write=write)
            classes, counts = _confusion(found, records)
        return Evaluation(found.folder, own.name, len(records), metrics, classes, counts)


def labeled_records(found: OpenAdapter) -> Records:
    """Return the labeled records that an adapter was opened with, or the public ones of its run.

    Raises
    ------
    InvalidValue
        There are none, or the task reads no files.
    """
    task = found.task
    if found.data is None:
        if found.config.dataset == NO_DATA:
            allowed = "a file of labeled records. The adapter's folder does not name those of a run"
            raise InvalidValue("data", None, allowed)
        return task.test_records()
    if isinstance(task, DatasetTask):
        return task.test_records()
    labeled = optional(task, "labeled")
    if labeled is None:
        allowed = f"no value, because task {task.name!r} reads no files. It has records of its own"
        raise InvalidValue("data", "records", allowed)
    records: Records = labeled(found.data)
    return records


def _confusion(found: OpenAdapter, records: Records) -> tuple[Sequence[str], list[list[int]]]:
    """Count each pair of a class and a prediction; none where a task has no scores of classes."""
    scores = optional(found.task, "scores")
    names = class_names(found.task) if scores else ()
    if scores is None or not names:
        return (), []
    predictions = scores(found.model, records).argmax(dim=1)
    labels = labels_of(records)
    assert labels is not None
    pairs = torch.bincount(labels * len(names) + predictions, minlength=len(names) ** 2)
    return names, pairs.view(len(names), len(names)).tolist()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
