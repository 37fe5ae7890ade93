"""A result is kept only for arrays that cannot have changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.last_arrays import OfLastArrays


def fixed(*values: float) -> NDArray[np.float64]:
    array = np.array(values)
    array.flags.writeable = False
    return array


def test_the_same_arrays_are_asked_about_once() -> None:
    asked: list[object] = []
    names = OfLastArrays(lambda arrays: asked.append(arrays) or "".join(arrays))  # type: ignore[func-returns-value]
    one, two = fixed(1.0), fixed(2.0)
    assert [names({"a": one, "b": two}) for _ in range(3)] == ["ab"] * 3
    assert len(asked) == 1
    # Other names, another order and equal arrays are other arguments.
    assert names({"a": one, "c": two}) == "ac"
    assert names({"c": two, "a": one}) == "ca"
    assert names({"c": two, "a": fixed(1.0)}) == "ca"
    assert len(asked) == 4


def test_arrays_that_can_change_are_asked_about_again() -> None:
    total = OfLastArrays(lambda arrays: sum(float(array.sum()) for array in arrays.values()))
    array = np.array([1.0])
    assert total({"a": array}) == 1.0
    array[0] = 5.0
    assert total({"a": array}) == 5.0
    # A read-only view changes with its base.
    view = array[:]
    view.flags.writeable = False
    assert total({"a": view}) == 5.0
    array[0] = 7.0
    assert total({"a": view}) == 7.0
