"""Records that stay in Arrow files and become tensors when a batch is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Rows = Mapping[str, Any]
Collate = Callable[[Rows], dict[str, Tensor]]
# Torch's cross entropy ignores the label -100.
PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


class ArrowRecords:
    """Records of an Arrow data set. A batch reads only the rows that it needs.

    Parameters
    ----------
    dataset : Dataset
        A data set with at least one column.
    collate : Callable[[Mapping[str, Any]], dict[str, Tensor]]
        Makes the tensors of a batch of n records from its columns. It receives numbers as an array
        of shape (n,), arrays of one shape as an array of shape (n, …), lists of numbers as a list
        of n arrays, and other columns (text, pictures) as a list of n decoded values. Arrays may be
        read-only: ``torch.tensor`` copies them, ``torch.from_numpy`` warns.

    Attributes
    ----------
    users : NDArray[np.int64] or None
        The user of each record, shape (n,), where the promise is for users.
    """

    users: NDArray[np.int64] | None = None

    def __init__(self, dataset: Dataset, collate: Collate) -> None:
        indices = dataset._indices
        # `Dataset.select` may keep the whole table and only list the row numbers that it picked.
        self._rows: NDArray[np.int64] = (
            np.arange(dataset.data.num_rows)
            if indices is None
            else indices.column(0).to_numpy().astype(np.int64)
        )
        self._features = dict(dataset.features)
        self._collate = collate
        self._chunks: list[pa.RecordBatch] = [
            chunk for chunk in dataset.data.table.to_batches() if chunk.num_rows
        ]
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in self._chunks)])

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the records at ``indices``.

        Parameters
        ----------
        indices : Tensor
            Positions, int64, shape (n,); n may be 0.

        Returns
        -------
        dict[str, Tensor]
            The tensors that ``collate`` makes of these records, in the order of ``indices``.

        Raises
        ------
        IndexError
            A position is negative or past the end.
        """
        return self._collate(self._columns(indices))

    def padded(self, indices: Tensor, width: int) -> dict[str, Tensor]:
        """Return the records at ``indices``, with lists padded to at least ``width`` tokens.

        A width above `limit` counts as `limit`.

        Raises
        ------
        TypeError
            The collate function is not a `PadCollate` (see `pads`).
        """
        if not isinstance(self._collate, PadCollate):
            raise TypeError("only a PadCollate pads to a width")
        return self._collate(self._columns(indices), width)

    @property
    def pads(self) -> bool:
        """Whether `padded` can be called: the collate function is a `PadCollate`."""
        return isinstance(self._collate, PadCollate)

    @property
    def limit(self) -> int | None:
        """Most tokens that the model reads; ``None`` if the collate function sets no limit."""
        return getattr(self._collate, "limit", None)

    @property
    def alike(self) -> bool:
        """Whether all records have tensors of the same shape: all columns are numbers or arrays."""
        kinds = [self._chunks[0].column(name).type for name in self._features if self._chunks]
        return all(_is_array(kind) for kind in kinds)

    def _columns(self, indices: Tensor) -> dict[str, Any]:
        positions = indices.numpy()
        if positions.size and positions.min() < 0:
            raise IndexError(f"position {positions.min()} of {len(self)} records")
        taken = self._take(self._rows[positions])
        return {name: self._column(name, taken.column(name)) for name in taken.schema.names}

    @cached_property
    def lengths(self) -> NDArray[np.int64] | None:
        """Length of the longest list of each record, shape (n,); ``None`` without list columns."""
        found = [
            np.concatenate([_lengths(chunk.column(name)) for chunk in self._chunks])
            for name in self._features
            if self._chunks and _is_ragged(self._chunks[0].column(name).type)
        ]
        if not found:
            return None
        longest: NDArray[np.int64] = np.max(found, axis=0)[self._rows]
        return longest

    def subset(self, indices: NDArray[np.int64]) -> ArrowRecords:
        """Return the records at ``indices`` as a view; the columns are not copied.

        Raises
        ------
        IndexError
            A position is past the end.
        """
        view = object.__new__(ArrowRecords)
        view.__dict__.update(self.__dict__)
        view.__dict__.pop("lengths", None)
        view._rows = self._rows[indices]
        view.users = None if self.users is None else self.users[indices]
        return view

    def values(self, name: str) -> NDArray[Any]:
        """Return one column of numbers or text, shape (n,), e.g. to split the records by.

        Raises
        ------
        InvalidValue
            There is no such column.
        """
        import pyarrow as pa

        if name not in self._features:
            raise InvalidValue("column", name, f"one of {sorted(self._features)}")
        chunks = [chunk.column(name) for chunk in self._chunks]
        column = pa.chunked_array(chunks).to_numpy()
        return np.asarray(column[self._rows])

    def _take(self, rows: NDArray[np.int64]) -> pa.RecordBatch:
        import pyarrow as pa

        if len(self._chunks) == 1:
            return self._chunks[0].take(pa.array(rows))
        # Arrow's own `take` would first copy all chunks into one. Instead, each chunk gives its
        # rows, and the joined rows are then sorted into the order asked for.
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        owners, begins = np.unique(owner[order], return_index=True)
        parts = [
            self._chunks[chunk].take(pa.array(rows[places] - self._starts[chunk]))
            for chunk, places in zip(owners, np.split(order, begins[1:]), strict=False)
        ]
        if not parts:
            return self._chunks[0].slice(0, 0)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_batches(parts).take(pa.array(back))

    def _column(self, name: str, array: pa.Array) -> Any:
        import pyarrow as pa

        feature, kind = self._features[name], array.type
        if hasattr(feature, "decode_example"):  # A picture or a class label (an integer).
            if not pa.types.is_integer(kind):
                return [feature.decode_example(value) for value in array.to_pylist()]
        elif pa.types.is_fixed_size_list(kind) and not array.null_count:
            return _dense(array)
        elif _is_ragged(kind):
            return _ragged(array)
        return array.to_numpy(zero_copy_only=False) if _numeric(kind) else array.to_pylist()


@dataclass(frozen=True)
class PadCollate:
    """Pads the lists of a batch to its longest record, or to a given width if that is larger.

    Parameters
    ----------
    fill : Mapping[str, int]
        Padding value of each list column; 0 for columns that are not named.
    multiple_of : int (default: 1)
        Widths are rounded up to a multiple of this number; 8 suits tensor cores.
    limit : int, optional
        Most tokens that the model reads. A given width counts up to this limit; records that are
        longer are not cut.
    """

    fill: Mapping[str, int]
    multiple_of: int = 1
    limit: int | None = None

    def __call__(self, rows: Rows, width: int = 0) -> dict[str, Tensor]:
        """Return the tensors of a batch.

        Raises
        ------
        InvalidValue
            A column is not numeric.
        """
        lists = [values for values in rows.values() if isinstance(values, list)]
        for name, values in rows.items():
            if isinstance(values, list) and not all(isinstance(v, np.ndarray) for v in values):
                raise InvalidValue("columns", name, "a column of numbers or of lists of numbers")
        longest = max((len(value) for values in lists for value in values), default=0)
        width = max(longest, width if self.limit is None else min(width, self.limit))
        width = -(-width // self.multiple_of) * self.multiple_of
        return {
            name: _padded(values, width, self.fill.get(name, 0))
            if isinstance(values, list)
            else _tensor(values)
            for name, values in rows.items()
        }


def pad_collate(
    pad_values: Mapping[str, int] | None = None, multiple_of: int = 1, limit: int | None = None
) -> PadCollate:
    """Return a collate function that pads lists of a batch to its longest record.

    Parameters
    ----------
    pad_values : Mapping[str, int], optional
        Padding value of each list column. It overrides `PADDING`, which has -100 for ``labels``
        and 0 for other columns.
    multiple_of : int (default: 1)
        Widths are rounded up to a multiple of this number; 8 suits tensor cores.
    limit : int, optional
        Most tokens that the model reads. No record may be longer.

    Returns
    -------
    PadCollate
        Integers become int64 tensors, shape (n,) or (n, width), other numbers keep their type.
        All list columns of a batch get one width. The batch has an ``attention_mask`` only if
        the records have that column.

    Raises
    ------
    InvalidValue
        ``multiple_of`` is below 1; when called: a column is not numeric.
    """
    if multiple_of < 1:
        raise InvalidValue("multiple_of", multiple_of, "a whole number above 0")
    return PadCollate({**PADDING, **(pad_values or {})}, multiple_of, limit)


def _padded(values: list[NDArray[Any]], width: int, fill: int) -> Tensor:
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    joined = np.concatenate(values) if values else np.empty(0, np.int64)
    kind = np.int64 if np.issubdtype(joined.dtype, np.integer) else joined.dtype
    padded = np.full((len(values), width), fill, dtype=kind)
    padded[np.arange(width) < lengths[:, None]] = joined
    return torch.from_numpy(padded)


def _tensor(values: NDArray[Any]) -> Tensor:
    kind = np.int64 if np.issubdtype(values.dtype, np.integer) else values.dtype
    return torch.from_numpy(np.array(values, dtype=kind))


def _numeric(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _is_ragged(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _numeric(kind.value_type)


def _is_array(kind: pa.DataType) -> bool:
    import pyarrow as pa

    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return _numeric(kind)


def _lengths(array: pa.Array) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return lengths


def _dense(array: pa.Array) -> NDArray[Any]:
    """Return nested lists of fixed lengths as an array."""
    import pyarrow as pa

    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    flat: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return flat.reshape(shape)


def _ragged(array: pa.Array) -> list[NDArray[Any]]:
    """Return lists of numbers as views of one array."""
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(offsets)]
