from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedlora_flwr.arrays import from_numpy, to_numpy

TYPES = st.sampled_from(["<f4", "<f8", "<f2", ">f4", "<i8", "|b1", "<c8"])
arrays = TYPES.flatmap(
    lambda dtype: (
        hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
            elements={"allow_nan": True},
        )
        if dtype[1] in "fc"
        else hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
    )
)


@given(arrays, st.booleans())
def test_the_bytes_are_flowers_own(values: NDArray[np.generic], transposed: bool) -> None:
    values = values.T if transposed else values
    ours, theirs = from_numpy(values), Array(values)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.data == theirs.data
    assert ours.object_id == theirs.object_id


@given(arrays, st.booleans())
def test_values_come_back_as_flower_gives_them(
    values: NDArray[np.generic], transposed: bool
) -> None:
    array = Array(values.T if transposed else values)
    found, expected = to_numpy(array), array.numpy()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_other_versions_of_the_format_are_read(version: tuple[int, int]) -> None:
    stream, values = BytesIO(), np.arange(6.0).reshape(2, 3)
    np.lib.format.write_array(stream, values, version=version)
    array = Array("float64", (2, 3), "numpy.ndarray", stream.getvalue())
    np.testing.assert_array_equal(to_numpy(array), values)


@pytest.mark.parametrize("cut", [3, 20, 130])
def test_broken_bytes_raise_as_flowers_own_reader_does(cut: int) -> None:
    data = Array(np.arange(6.0)).data[:cut]
    array = Array("float64", (6,), "numpy.ndarray", data)
    with pytest.raises(ValueError):
        array.numpy()
    with pytest.raises(ValueError):
        to_numpy(array)


def test_what_is_no_numpy_array_is_refused() -> None:
    with pytest.raises(TypeError, match="serialization type"):
        to_numpy(Array("float64", (1,), "torch", b"\x93NUMPY\x01\x00"))


def test_objects_are_never_unpickled() -> None:
    stream = BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        to_numpy(Array("object", (1,), "numpy.ndarray", stream.getvalue()))
