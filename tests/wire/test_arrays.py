from __future__ import annotations

import pickle
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedlora_flwr.wire.arrays import from_numpy, record_of, to_numpy, travel_size

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


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**32, 2**32), (-1,), (-2, -3), (7,)])
def test_a_header_that_says_more_than_there_is_makes_no_room_for_it(
    shape: tuple[int, ...], fortran: bool
) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    text = header.ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 24
    with pytest.raises(ValueError, match="entries of float32; its data differ"):
        to_numpy(Array("float32", shape, "numpy.ndarray", data))


def test_an_archive_of_arrays_is_no_array() -> None:
    stream = BytesIO()
    np.savez(stream, a=np.ones(3))
    with pytest.raises(TypeError, match="no single array"):
        to_numpy(Array("float64", (3,), "numpy.ndarray", stream.getvalue()))


def test_what_is_no_numpy_array_is_refused() -> None:
    with pytest.raises(TypeError, match="serialization type"):
        to_numpy(Array("float64", (1,), "torch", b"\x93NUMPY\x01\x00"))


def test_objects_are_never_unpickled() -> None:
    stream = BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        to_numpy(Array("object", (1,), "numpy.ndarray", stream.getvalue()))


@given(arrays)
def test_the_values_are_a_copy_that_nobody_can_change(values: NDArray[np.generic]) -> None:
    before = values.tobytes()
    array = from_numpy(values)
    values.fill(0)
    array.numpy().fill(0)
    with pytest.raises(ValueError, match="read-only"):
        to_numpy(array).fill(0)
    assert to_numpy(array).tobytes() == before


def test_a_read_only_view_of_what_others_can_change_is_copied() -> None:
    values = np.arange(3.0)
    view = values[:]
    view.flags.writeable = False
    array = from_numpy(view)
    values.fill(9)
    assert to_numpy(array).tolist() == [0.0, 1.0, 2.0]


def test_what_nobody_can_change_is_not_copied() -> None:
    values = np.arange(3.0)
    values.flags.writeable = False
    assert to_numpy(from_numpy(values)) is values


@given(arrays, st.booleans())
def test_an_array_equals_flowers_own_of_the_same_values(
    values: NDArray[np.generic], transposed: bool
) -> None:
    values = values.T if transposed else values
    ours, theirs, other = from_numpy(values), Array(values), Array(np.arange(99.0))
    assert ours == theirs == ours == from_numpy(values)
    assert ours != other != ours
    assert travel_size(ours) == travel_size(theirs) == len(theirs.data)


def test_a_record_holds_the_very_arrays_and_travels_as_flowers_own() -> None:
    values: dict[str, NDArray[Any]] = {
        "a": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4),
    }
    ours = {name: from_numpy(array) for name, array in values.items()}
    record = record_of(ours)
    theirs = ArrayRecord({name: Array(array) for name, array in values.items()})

    assert not any("data" in vars(array) for array in ours.values())
    assert pickle.loads(pickle.dumps(record)) == record == theirs
    assert all(record[name] is array for name, array in ours.items())
    assert recorddict_to_proto(RecordDict({"x": record})) == recorddict_to_proto(
        RecordDict({"x": theirs})
    )
    assert record.object_id == theirs.object_id
    objects = {i: o.deflate() for i, o in get_all_nested_objects(record).items()}
    back = inflate_object_from_contents(record.object_id, objects)
    assert isinstance(back, ArrayRecord)
    assert all((to_numpy(back[name]) == array).all() for name, array in values.items())
