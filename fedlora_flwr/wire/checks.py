"""Checks of a report's arrays and notes; each raises `InvalidValue` if a value is not allowed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import limits
from fedlora_flwr.wire.limits import ARRAY_NAME, NAME, Text, shown

_FLOATS = (2, 4, 8)


def checked_notes(notes: Mapping[str, object]) -> dict[str, bool | bytes | str]:
    """Check flags, texts and bytes, so that a log can show them, and return them."""
    if len(notes) > limits.MOST_NOTES:
        raise InvalidValue("further texts", len(notes), f"at most {limits.MOST_NOTES}")
    found: dict[str, bool | bytes | str] = {}
    for name, value in notes.items():
        NAME.read("name", name)
        if isinstance(value, bytes) and len(value) > limits.LONGEST_BYTES:
            raise InvalidValue(name, shown(value), f"at most {limits.LONGEST_BYTES} bytes")
        if isinstance(value, bool | bytes) or value == "":
            found[name] = value
        else:
            found[name] = Text(limits.LONGEST_TEXT).read(name, value)
    return found


def checked_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Check that arrays are finite and within range, and return them in fp32."""
    _check_count(arrays)
    return {_array_name(name): _checked_array(name, a) for name, a in arrays.items()}


def checked_shares(arrays: Mapping[str, NDArray[Any]]) -> dict[str, limits.Residues]:
    """Check the names, number and type of a secure sum's arrays, and return them.

    Any uint32 is a valid entry.
    """
    _check_count(arrays)
    for name, array in arrays.items():
        if array.dtype != limits.RESIDUE:
            raise InvalidValue(f"type of {name}", str(array.dtype)[:60], "uint32")
    return {_array_name(name): array for name, array in arrays.items()}


@lru_cache(maxsize=4096)
def _array_name(name: object) -> str:
    return ARRAY_NAME.read("array name", name)


def _check_count(arrays: Mapping[str, NDArray[Any]]) -> None:
    if len(arrays) > limits.MOST_ARRAYS:
        raise InvalidValue("uploaded arrays", len(arrays), f"at most {limits.MOST_ARRAYS}")
    total = sum(array.size for array in arrays.values())
    if total > limits.MOST_ENTRIES:
        raise InvalidValue("entries of all arrays", total, f"at most {limits.MOST_ENTRIES}")


def _checked_array(name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype.kind != "f" or array.dtype.itemsize not in _FLOATS:
        raise InvalidValue(f"type of {name}", str(array.dtype)[:60], "floating-point numbers")
    values = array if array.dtype == np.float32 else _narrowed(array)
    if limits.within(values, limits.MOST_UPLOADED_ENTRY):
        return values
    lowest, highest = float(values.min()), float(values.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise InvalidValue(f"array {name}", "NaN or infinity", "finite numbers")
    largest = f"entries up to {max(highest, -lowest):g}"
    allowed = f"entries of at most {limits.MOST_UPLOADED_ENTRY:g}"
    raise InvalidValue(f"array {name}", largest, allowed)


def _narrowed(array: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)
