"""The common part of the tasks that classify texts or pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.arrow_records import ArrowRecords
from fedlora_flwr.data.labels import Labels, near_names, without_class
from fedlora_flwr.data.names import names
from fedlora_flwr.data.reading import Reading
from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.data.unusable import naming
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.dataset_task import DatasetTask
from fedlora_flwr.tasks.evaluation import class_predictions, evaluate_classifier, scores_of

if TYPE_CHECKING:
    from datasets import Dataset, Features


class ClassifierTask(DatasetTask):
    """Tell classes apart; batches hold ``label``, (n,) int64.

    Records without a class are left out. With ``class-names`` or ``num-classes``, the classes do
    not depend on the private records, and building the model does not open these records.

    Parameters
    ----------
    settings : RunConfig
        Model, data set, split and classes.

    Raises
    ------
    InvalidValue
        As the base class; or ``class-names`` and ``num-classes`` contradict each other.
    """

    metric = "accuracy"

    def __init__(self, settings: RunConfig) -> None:
        super().__init__(settings)
        self._labels = Labels(
            # No limit (0): a limit must not change the classes.
            lambda: self._usable(settings.train_split, 0),
            self._private_columns,
            settings.label_column,
            settings.num_classes,
            names(settings.class_names),
        )

    @abstractmethod
    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each record's scores, shape (n, classes), fp32."""

    @property
    def num_classes(self) -> int:
        """Number of classes, which are the outputs of the classifier."""
        return self._labels.count

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes in the order of their numbers.

        A class without a name is called by its number.

        Raises
        ------
        InvalidValue
            The private split has to tell the classes, and cannot be read.
        """
        return self._labels.names

    def unstated_classes(self) -> list[str]:
        """Return the names of the private classes if only ``num-classes`` is configured.

        Each device numbers such names by its own data set, so ``class-names`` should list them.

        Raises
        ------
        InvalidValue
            The private split cannot be read, or the classes are neither numbers nor text.
        """
        return self._labels.unstated(self._usable(self._settings.train_split, 0))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross entropy of each record, shape (n,)."""
        return F.cross_entropy(self._logits(model, batch), batch["label"], reduction="none")

    def evaluate(self, model: nn.Module, records: Records) -> dict[str, float]:
        """Return mean ``loss`` and ``accuracy``, and those of each split if there are several."""
        return evaluate_classifier(
            model,
            records,
            partial(self._logits, model),
            self._settings.eval_batch_size,
            self.test_splits,
        )

    def scores(self, model: nn.Module, records: Records) -> Tensor:
        """Return each record's scores, shape (n, classes), fp64."""
        size = self._settings.eval_batch_size
        return scores_of(model, records, partial(self._logits, model), size)

    def predictions(self, model: nn.Module, dataset: Dataset) -> Mapping[str, Sequence[Any]]:
        """Return the class of each record with its probability.

        Raises
        ------
        InvalidValue
            A column is missing, or a record cannot be read.
        """
        with naming(dataset):
            records = self._unlabeled(dataset)
        return class_predictions(self.scores(model, records), self.class_names())

    @abstractmethod
    def _unlabeled(self, dataset: Dataset) -> ArrowRecords:
        """Turn a data set into records without their classes."""

    def _private_columns(self) -> Features | None:
        private = self._private_source()
        return None if private is None else private.features

    def _rows(self, dataset: Dataset, split: str) -> NDArray[np.int64]:
        rows = super()._rows(dataset, split)
        if len(rows) == 0:
            reasons = ", ".join(f"{len(n)} with {why}" for why, n in self._lacking(dataset).items())
            allowed = f"a column with a class for some record of split {split!r}: it has {reasons}"
            raise InvalidValue("label-column", self._settings.label_column, allowed)
        return rows

    def _reading(self, split: str, limit: int) -> Reading:
        found, used = super()._reading(split, limit), self._usable(split, limit)
        with naming(used):
            self._labels.numbers(used)  # Bad classes are refused now, not in the first round.
        return found

    def _columns(self) -> dict[str, NDArray[Any]]:
        self._labels.require_column(self._train)  # Else the partitioner would be to blame.
        return super()._columns()

    def _lacking(self, dataset: Dataset) -> dict[str, NDArray[np.int64]]:
        return without_class(dataset, self._settings.label_column)

    def _notes(self, dataset: Dataset) -> list[str]:
        near = near_names(dataset, self._settings.label_column)
        text = "classes {} differ only in case or blanks, but count as different classes"
        return [*super()._notes(dataset), *(text.format(group) for group in near)]

    def _with_classes(self, prepared: Dataset, dataset: Dataset, *, training: bool) -> Dataset:
        """Add to prepared records their class and, as ``part``, the number of their test split.

        Adding a column earlier, to a selection of a data set, would copy the data set.
        """
        numbered = prepared.add_column("label", self._labels.numbers(dataset))
        sizes = [len(dataset)] if training else [len(split) for split in self._opened_tests]
        if len(sizes) == 1:
            return numbered
        return numbered.add_column("part", np.repeat(np.arange(len(sizes)), sizes))
