"""NumPy arrays into Flower's `Array` and back.

Flower reads and writes each array with `numpy.load` and `numpy.save`, which spend most of their
time on the header: an adapter is a hundred small arrays, of a handful of shapes. Here a header is
parsed and made once for each shape and type; the bytes are the same.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array
from flwr.common.constant import SType
from numpy.lib import format as npy
from numpy.typing import NDArray

_MAGIC = b"\x93NUMPY\x01\x00"


def to_numpy(array: Array) -> NDArray[Any]:
    """Return an array's values, read-only where they need no copy.

    Raises
    ------
    TypeError, ValueError
        As `Array.numpy`: it holds no NumPy array, or a broken one.
    """
    data = array.data
    if array.stype != SType.NUMPY or data[: len(_MAGIC)] != _MAGIC:
        return array.numpy()
    start = len(_MAGIC) + 2 + int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
    shape, fortran, dtype = _parsed(data[:start])
    size = int(np.prod(shape, dtype=np.int64))
    if fortran or dtype.hasobject or len(data) < start + size * dtype.itemsize:
        return array.numpy()
    return np.frombuffer(data, dtype, size, start).reshape(shape)


def from_numpy(values: NDArray[np.generic]) -> Array:
    """Return the same `Array` as ``Array(values)``."""
    if not values.flags.c_contiguous or values.dtype.hasobject:
        return Array(values)
    data = _header(values.shape, values.dtype.str) + values.tobytes()
    return Array(str(values.dtype), values.shape, SType.NUMPY, data)


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
