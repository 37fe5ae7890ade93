"""Errors about unusable records, which name the file of the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora_flwr.data.plain_text import reason
from fedlora_flwr.errors import FedLoRAError, InvalidValue

if TYPE_CHECKING:
    from datasets import Dataset


def named(
    dataset: Dataset, function: Callable[[dict[str, list[Any]]], Any], rows: Iterable[int]
) -> InvalidValue | None:
    """Return the error of the first record that cannot be read or that ``function`` rejects.

    Parameters
    ----------
    dataset : Dataset
        The records.
    function : Callable
        Takes the columns of some records, as lists.
    rows : Iterable[int]
        Positions of the records to try, one of which caused an error.

    Returns
    -------
    InvalidValue or None
        Error that names the picture's file, or the data set and the record's number in it.
        ``None`` if each record can be used alone.
    """
    for row in rows:
        try:
            function(dataset[row : row + 1])
        except (FedLoRAError, AssertionError, MemoryError, RuntimeError):
            raise
        except Exception as error:
            pictures = bool(_picture_columns(dataset))
            kind = "pictures that can be decoded" if pictures else "records that the task can read"
            text = f"{kind} ({type(error).__name__}: {reason(error)}). Correct or remove it"
            return InvalidValue("dataset", _place(dataset, row), text)
    return None


@contextmanager
def naming(dataset: Dataset) -> Iterator[None]:
    """Add the name of the data set's file to errors about its columns and values.

    Raises
    ------
    InvalidValue
        The error raised inside the block, with the name of the file added.
    """
    try:
        yield
    except InvalidValue as error:
        file = dataset.info.dataset_name
        if not file or file in str(error):
            raise
        allowed = f"{error.allowed} (read from {file})"
        raise InvalidValue(error.key, error.value, allowed, error.near) from error


@contextmanager
def naming_split(key: str) -> Iterator[None]:
    """Name the configuration's keys in errors about a split or a subset.

    Parameters
    ----------
    key : str
        Key that names the split, ``"train-split"`` or ``"test-split"``.

    Raises
    ------
    InvalidValue
        The error raised inside the block, with the key that holds the value.
    """
    keys = {"split": key, "subset": "dataset-subset"}
    try:
        yield
    except InvalidValue as error:
        if error.key not in keys:
            raise
        raise InvalidValue(keys[error.key], error.value, error.allowed, error.near) from error


def _place(dataset: Dataset, row: int) -> str:
    """Say where a record is: a picture's own file, or its number in the table."""
    import datasets

    for name in _picture_columns(dataset):
        raw = dataset.cast_column(name, datasets.Image(decode=False))[row][name]
        if raw and raw["path"] and raw["bytes"] is None:
            return str(raw["path"])
    indices = dataset._indices
    number = row if indices is None else indices.column(0)[row].as_py()
    return f"record {number}, counted from 0, of {dataset.info.dataset_name or 'the data set'}"


def _picture_columns(dataset: Dataset) -> list[str]:
    import datasets

    return [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
