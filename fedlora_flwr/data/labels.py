"""Classes of records, as numbers from 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.data.missing import missing
from fedlora_flwr.data.sources import CLASS_FOLDERS
from fedlora_flwr.data.unusable import naming
from fedlora_flwr.errors import InvalidValue, unknown

if TYPE_CHECKING:
    from datasets import Dataset, Features

# Numbers of classes may have gaps: there may be up to 100 classes, or 10 for each that occurs.
_FEW, _GAP = 100, 10


class Labels:
    """Numbers classes, which a data set may hold as names, as numbers, or as numbered names.

    A class that has a name is identified by the name. If the configuration names the classes, their
    order gives their numbers, and these do not depend on private records. If it gives only the
    number of classes, the records must hold numbers: names would be numbered by the records that
    happen to be there, and differently on each device. If it gives neither, the classes are those
    of the private split, which suits a simulation.

    Parameters
    ----------
    private : Callable[[], Dataset]
        Opens the private split. Called only if neither ``num_classes`` nor ``class_names`` is
        given.
    schema : Callable[[], Features | None]
        Returns the columns of the private split, or ``None`` if it is not on this machine. Without
        ``class_names``, they give the order in which a data set numbers its names.
    column : str
        Name of the column with the class.
    num_classes : int
        Number of classes; 0 to count those of the private split.
    class_names : Sequence[str] (default: ())
        Names of the classes in the order of their numbers. A number in the data set is a position
        in this list, or a name if all names are whole numbers.

    Raises
    ------
    InvalidValue
        A name is given twice, or the two settings contradict each other.
    """

    def __init__(
        self,
        private: Callable[[], Dataset],
        schema: Callable[[], Features | None],
        column: str,
        num_classes: int,
        class_names: Sequence[str] = (),
    ) -> None:
        self._private, self._schema, self._column = private, schema, column
        self._num_classes, self._class_names = num_classes, tuple(class_names)
        if len(set(class_names)) < len(class_names):
            raise InvalidValue("class-names", ",".join(class_names), "each name once")
        if class_names and num_classes not in (0, len(class_names)):
            allowed = f"0 or {len(class_names)}, the number of names in class-names"
            raise InvalidValue("num-classes", num_classes, allowed)

    @cached_property
    def count(self) -> int:
        """Number of classes.

        Raises
        ------
        InvalidValue
            The private split has to be counted, but it lacks the column, holds other values in it,
            or its numbers are far apart.
        """
        if self._class_names or self._num_classes:
            return len(self._class_names) or self._num_classes
        if self._order:
            return len(self._order)
        with naming(dataset := self._private()):
            return self._counted(dataset)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers. A number stands for a missing name.

        Raises
        ------
        InvalidValue
            As `count`.
        """
        return self._order or tuple(map(str, range(self.count)))

    def _counted(self, dataset: Dataset) -> int:
        known = getattr(dataset.features[self._column], "num_classes", 0) or 0
        found = np.unique(self._read(dataset))
        count = max(int(found[-1]) + 1, known)
        if count > max(_FEW, _GAP * len(found), known):
            allowed = (
                f"a column of classes numbered from 0, but {len(found)} classes have numbers up "
                f"to {found[-1]}. Name them with class-names, or set num-classes = {count}"
            )
            raise InvalidValue("label-column", self._column, allowed)
        return count

    def unstated(self, dataset: Dataset) -> list[str]:
        """Return the names of a data set's classes if the configuration gives only their number.

        Parameters
        ----------
        dataset : Dataset
            Records that all have a class.

        Returns
        -------
        list[str]
            Empty if the configuration names the classes, or if the classes are numbers.
        """
        if self._class_names or not self._num_classes:
            return []
        values = self._read(dataset)
        if stated := self._stated(dataset.features[self._column]):
            return list(stated)
        return sorted(set(values)) if values.dtype == object else []

    def require_column(self, dataset: Dataset) -> None:
        """Refuse a data set without the column of the class.

        Raises
        ------
        InvalidValue
            There is no such column.
        """
        if self._column not in dataset.features:
            with naming(dataset):
                raise unknown("label-column", self._column, dataset.features)

    def numbers(self, dataset: Dataset) -> NDArray[np.int64]:
        """Return the class of each record, shape (n,).

        Raises
        ------
        InvalidValue
            The column is missing, holds other values or an unknown class, or holds names of unknown
            order.
        """
        values = self._read(dataset)
        if own := self._stated(dataset.features[self._column]):
            return self._known(self._renumbered(values, own, dataset))
        if values.dtype != object and not self._numbers_are_names(values):
            self._require_numbers(values)
            return self._known(values.astype(np.int64))
        found, codes = np.unique(values, return_inverse=True)
        names, order = [str(value) for value in found], self._name_order()
        if values.dtype == bool:
            names, order = ([name.lower() for name in each] for each in (names, order))
        return self._by_name(codes, names, order)

    def _renumbered(
        self, values: NDArray[np.int64], own: tuple[str, ...], dataset: Dataset
    ) -> NDArray[np.int64]:
        """Turn the numbers that a data set gives its names into those of the configuration."""
        folders = dataset.info.builder_name == CLASS_FOLDERS
        if folders and not self._class_names and len(own) < self._num_classes:
            allowed = (
                f"the names of the {self._num_classes} classes in the order of their numbers, "
                f"which {len(own)} class folders cannot tell"
            )
            raise InvalidValue("class-names", "", allowed)
        order = self._order
        if not order or own == order:
            return values
        if int(values.max()) >= len(own):
            allowed = f"a column in which each number has a name, but {values.max()} has none"
            raise InvalidValue("label-column", self._column, allowed)
        return self._by_name(values, own, order)

    def _by_name(
        self, codes: NDArray[np.int64], names: Sequence[str], order: Sequence[str]
    ) -> NDArray[np.int64]:
        """Return the numbers of classes that are given as positions in ``names``."""
        index = {name: number for number, name in enumerate(order)}
        numbers = np.array([index.get(name, -1) for name in names], dtype=np.int64)
        found: NDArray[np.int64] = numbers[codes]
        if (found < 0).any():
            others = sorted({names[code] for code in np.unique(codes[found < 0])})
            raise self._left_out(others, order)
        return found

    def _left_out(self, others: Sequence[str], order: Sequence[str]) -> InvalidValue:
        """Return the error about classes of records that are not among the known ones."""
        allowed = f"the names of all classes: column {self._column!r} also holds {list(others)}"
        if not self._class_names:
            allowed += ", and the private split has "
            allowed += f"{list(order)} alone" if order else "numbers"
        allowed += ". Name all, or correct those records"
        return InvalidValue("class-names", ",".join(self._class_names), allowed)

    def _known(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        if (found := int(numbers.max()) + 1) > self.count:
            if self._class_names:
                allowed = f"at least {found} names, as a record has class {found - 1}"
                raise InvalidValue("class-names", ",".join(self._class_names), allowed)
            allowed = f"at least {found}, as a record has class {found - 1}"
            raise InvalidValue("num-classes", self.count, allowed)
        return numbers

    def _require_numbers(self, values: NDArray[Any]) -> None:
        """Refuse numbers if the classes are texts of the private split, which have no numbers."""
        columns = self._schema() or {}
        if self._class_names or self._num_classes or self._stated(columns.get(self._column)):
            return
        truth = values.dtype == bool and {n.lower() for n in self._order} <= {"false", "true"}
        if self._order and not truth:
            allowed = (
                f"a column of text, because the private split has the classes "
                f"{list(self._order)}, but this split has {values[0]}. Name the classes with "
                "class-names, or write them alike in all splits"
            )
            raise InvalidValue("label-column", self._column, allowed)

    def _name_order(self) -> Sequence[str]:
        if not self._order and self._num_classes:
            allowed = (
                f"the names of the {self._num_classes} classes in the order of their numbers, as "
                f"column {self._column!r} holds text"
            )
            raise InvalidValue("class-names", "", allowed)
        return self._order

    @cached_property
    def _order(self) -> tuple[str, ...]:
        """Names of the classes; empty if they are numbers."""
        if self._class_names:
            return self._class_names
        columns = self._schema() or {}
        if stated := self._stated(columns.get(self._column)):
            return stated
        if self._num_classes:
            return ()
        values = self._read(self._private())
        return tuple(sorted(set(values))) if values.dtype == object else ()

    def _stated(self, feature: Any) -> tuple[str, ...]:
        """Return the names that a column's type gives its numbers.

        Names "0", "1" and so on do not count: the library makes them up if a file has no names.
        """
        names = tuple(getattr(feature, "names", None) or ())
        made_up = names == tuple(map(str, range(len(names))))
        return () if made_up and not set(names) <= set(self._class_names) else names

    def _numbers_are_names(self, values: NDArray[Any]) -> bool:
        names = self._class_names
        if values.dtype == bool:
            return bool(names) and {name.lower() for name in names} <= {"false", "true"}
        return bool(names) and all(name.isdecimal() for name in names)

    def _read(self, dataset: Dataset) -> NDArray[Any]:
        with naming(dataset):
            return self._values(dataset)

    def _values(self, dataset: Dataset) -> NDArray[Any]:
        """Return the column as int64, bool, or text of dtype object."""
        self.require_column(dataset)
        if _is_scalar(dataset, self._column):
            held = dataset[self._column][:]
            values = np.asarray(held)
            if values.dtype.kind in "iuf" and (whole := _whole(values)) is not None:
                return whole
            if values.dtype.kind == "b":
                return values
            if values.dtype.kind == "U":
                # NumPy's own text type would lose zero characters at the end.
                return np.array(held, dtype=object)
        allowed = f"a column of whole numbers or text, not of {dataset.features[self._column]}"
        raise InvalidValue("label-column", self._column, allowed)


def without_class(dataset: Dataset, column: str) -> dict[str, NDArray[np.int64]]:
    """Return the positions of the records that have no class, by the reason.

    The column is empty, or holds a number below 0, as in SNLI's records without a verdict.
    """
    if column not in dataset.features or not _is_scalar(dataset, column):
        return {}
    values = np.asarray(dataset[column][:])
    if values.dtype == object:
        below = np.fromiter(
            (isinstance(value, int | float) and value < 0 for value in values), bool
        )
    elif values.dtype.kind in "if":
        below = values < 0
    else:
        return {}
    found = {f"nothing in {column!r}": missing(values), f"a number below 0 in {column!r}": below}
    return {reason: np.flatnonzero(rows) for reason, rows in found.items() if rows.any()}


def near_names(dataset: Dataset, column: str) -> list[list[str]]:
    """Return groups of classes with names that differ only in case, blanks or Unicode's forms."""
    feature = dataset.features.get(column)
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        names = list({name for name in dataset[column][:] if name is not None})
    else:
        names = list(getattr(feature, "names", None) or ())
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
        groups.setdefault(plain, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _is_scalar(dataset: Dataset, column: str) -> bool:
    import datasets

    return isinstance(dataset.features[column], (datasets.Value, datasets.ClassLabel))


def _whole(values: NDArray[Any]) -> NDArray[np.int64] | None:
    """Return numbers as integers; ``None`` if one is not whole or too large for that."""
    if values.dtype.kind == "f" and not (values == np.trunc(values)).all():
        return None
    most = 2**53 if values.dtype.kind == "f" else 2**63 - 1
    return None if len(values) and int(values.max()) > most else values.astype(np.int64)
