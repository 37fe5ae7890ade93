"""Classes of records, as numbers from 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue, one_of

if TYPE_CHECKING:
    from datasets import Dataset


class Labels:
    """Classes by number, whatever the data set calls them: whole numbers from 0, or text.

    Parameters
    ----------
    private : Callable[[], Dataset]
        Opens the private split, for what only it can tell: how many classes there are, if
        ``num_classes`` does not say so, and their names, if they are text.
    column : str
        Name of the column with the class.
    num_classes : int
        How many there are; 0 to count those of the private split.
    """

    def __init__(self, private: Callable[[], Dataset], column: str, num_classes: int) -> None:
        self._private, self._column, self._num_classes = private, column, num_classes

    @cached_property
    def count(self) -> int:
        """Number of classes.

        Raises
        ------
        InvalidValue
            The private split has no such column, or something else in it.
        """
        if self._num_classes:
            return self._num_classes
        if self._names:
            return len(self._names)
        dataset = self._private()
        known = getattr(dataset.features[self._column], "num_classes", 0) or 0
        return max(int(self._read(dataset).max()) + 1, known)

    def numbers(self, dataset: Dataset) -> NDArray[np.int64]:
        """Return the class of each record, shape (n,).

        Raises
        ------
        InvalidValue
            There is no such column, it holds something else, or a class beyond those there are.
        """
        values = self._read(dataset)
        if values.dtype != object:
            if (found := int(values.max()) + 1) > self.count:
                allowed = f"at least {found}: a record is of class {found - 1}"
                raise InvalidValue("num-classes", self.count, allowed)
            return values
        index = {name: number for number, name in enumerate(self._names)}
        if unknown := sorted(set(values) - set(index)):
            allowed = f"a column of {list(self._names)}; another split has {unknown}"
            raise InvalidValue("label-column", self._column, allowed)
        if len(index) > self.count:
            allowed = f"at least {len(index)}, or 0 to count them"
            raise InvalidValue("num-classes", self.count, allowed)
        return np.array([index[value] for value in values], dtype=np.int64)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        values = self._read(self._private())
        return tuple(sorted(set(values))) if values.dtype == object else ()

    def _read(self, dataset: Dataset) -> NDArray[Any]:
        if self._column not in dataset.features:
            allowed = one_of(dataset.features, self._column)
            raise InvalidValue("label-column", self._column, allowed)
        if _is_scalar(dataset, self._column):
            values = np.asarray(dataset[self._column][:])
            if values.dtype.kind in "iub":
                return values.astype(np.int64)
            if values.dtype.kind == "U":
                return values.astype(object)
        allowed = f"a column of whole numbers or text, not of {dataset.features[self._column]}"
        raise InvalidValue("label-column", self._column, allowed)


def with_class(dataset: Dataset, column: str) -> NDArray[np.int64]:
    """Return the positions of the records that have a class, shape (m,).

    Others have nothing in the column, or a number below 0, as SNLI's without a verdict.
    """
    if column not in dataset.features or not _is_scalar(dataset, column):
        return np.arange(len(dataset))
    values = np.asarray(dataset[column][:])
    if values.dtype.kind == "i":
        return np.flatnonzero(values >= 0)
    missing = (value is None or (isinstance(value, int) and value < 0) for value in values)
    return np.flatnonzero(~np.fromiter(missing, bool, len(values)))


def _is_scalar(dataset: Dataset, column: str) -> bool:
    import datasets

    return isinstance(dataset.features[column], (datasets.Value, datasets.ClassLabel))
