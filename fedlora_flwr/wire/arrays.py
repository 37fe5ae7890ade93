"""Conversion of NumPy arrays to Flower's `Array` and back.

Flower writes an array's bytes when it makes an `Array`, and reads them whenever the values are
needed. Most of that time is spent on headers, as an adapter has a hundred small arrays with few
different shapes. Here the values are kept, their bytes are made only when they are sent, and the
header of each shape and type is made and parsed once. The bytes are the same as Flower's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr import app
from flwr.app import ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedlora_flwr.flower_internals import SType

_NUMPY = SType.NUMPY
_MAGIC = b"\x93NUMPY\x01\x00"


class Array(app.Array):
    """Flower's `Array`, except that its bytes are made only when they are needed.

    Flower writes the class's name next to the bytes, so this class has the same name as Flower's.

    Parameters
    ----------
    values : ndarray
        Any shape, C-contiguous, no objects. The values are copied, unless they are read-only and
        own their memory, so that no caller can change them.

    Attributes
    ----------
    size : int
        Number of bytes in `data`.
    """

    __hash__ = None  # type: ignore[assignment]
    values: NDArray[np.generic]
    size: int

    def __init__(self, values: NDArray[np.generic]) -> None:
        if values.flags.writeable or not values.flags.owndata:
            values = values.copy()
            values.flags.writeable = False
        name, header = _form(values.shape, values.dtype)
        # This bypasses Flower's `__setattr__`, which would clear cached results.
        vars(self).update(
            dtype=name,
            shape=values.shape,
            stype=_NUMPY,
            values=values,
            size=header + values.nbytes,
        )

    @cached_property
    def data(self) -> bytes:  # type: ignore[override]
        """The values in the format of `numpy.save`."""
        return _header(self.shape, self.values.dtype.str) + self.values.tobytes()

    def numpy(self) -> NDArray[Any]:
        """Return a copy of the values, as Flower's `Array` does."""
        return self.values.copy()

    def __eq__(self, other: object) -> bool:
        """Compare with any `Array`, including Flower's own class."""
        if not isinstance(other, app.Array):
            return NotImplemented
        mine, theirs = ((a.dtype, a.shape, a.stype, a.data) for a in (self, other))
        return mine == theirs


def to_numpy(array: app.Array) -> NDArray[Any]:
    """Return an array's values; they are read-only if they are not copied.

    Raises
    ------
    TypeError, ValueError
        The data are not one NumPy array, or are damaged (as for Flower's `Array.numpy`).
    """
    if isinstance(array, Array):
        return array.values
    data = array.data
    if array.stype != SType.NUMPY or data[: len(_MAGIC)] != _MAGIC:
        values = array.numpy()
        if not isinstance(values, np.ndarray):  # NumPy has read an archive of several arrays.
            raise TypeError("The array's data hold no single array.")
        return values
    start = len(_MAGIC) + 2 + int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    shape, fortran, dtype = _parsed(data[:start])
    if dtype.hasobject:
        return array.numpy()
    size = math.prod(shape)
    # NumPy's reader would allocate the size in the header before it notices missing data.
    if min(shape, default=0) < 0 or len(data) < start + size * dtype.itemsize:
        raise ValueError(f"The array's header says {size} entries of {dtype}; its data differ.")
    return np.frombuffer(data, dtype, size, start).reshape(shape, order="F" if fortran else "C")


def from_numpy(values: NDArray[np.generic]) -> app.Array:
    """Return an array that has the same bytes on the wire as Flower's ``Array(values)``."""
    if not values.flags.c_contiguous or values.dtype.hasobject:
        return app.Array(values)
    return Array(values)


def record_of(arrays: Mapping[str, app.Array]) -> ArrayRecord:
    """Return a record that holds these array objects; Flower's constructor would copy them."""
    record = ArrayRecord()
    if all(type(name) is str and isinstance(array, app.Array) for name, array in arrays.items()):
        # The record would look at each type once more, by ten times as many calls.
        vars(record)["_data"].update(arrays)
        record.is_dirty = True
    else:
        record.update(arrays)
    return record


def travel_size(array: app.Array) -> int:
    """Return the number of bytes that an array has when it is sent."""
    return array.size if isinstance(array, Array) else len(array.data)


def record_size(record: ArrayRecord) -> int:
    """Return the number of bytes that a record's arrays have when it is sent."""
    return sum(map(travel_size, record.values()))


@lru_cache(maxsize=4096)
def _form(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> tuple[str, int]:
    """Return the name of a type, and the length of an array's header."""
    return str(dtype), len(_header(shape, dtype.str))


@lru_cache(maxsize=4096)
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    stream = BytesIO(header)
    npy.read_magic(stream)
    return npy.read_array_header_1_0(stream)


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = BytesIO()
    empty = np.broadcast_to(np.zeros((), dtype), shape)
    content = {**npy.header_data_from_array_1_0(empty), "fortran_order": False}
    npy.write_array_header_1_0(stream, content)
    return stream.getvalue()
