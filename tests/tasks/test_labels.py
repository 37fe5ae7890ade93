from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.labels import Labels, with_class

OPENED = "the private split was opened"


def column(values: Sequence[Any], kind: Any = None) -> Dataset:
    features = None if kind is None else Features({"kind": kind})
    return Dataset.from_dict({"kind": list(values)}, features=features)


def labels(private: Dataset | None, num_classes: int = 0) -> Labels:
    def opened() -> Dataset:
        assert private is not None, OPENED
        return private

    return Labels(opened, "kind", num_classes)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_whole_numbers_stay_and_the_largest_counts(private: list[int], other: list[int]) -> None:
    found = labels(column(private))
    assert found.count == max(private) + 1
    assert found.numbers(column(private)).tolist() == private
    if max(other) <= max(private):
        assert found.numbers(column(other)).tolist() == other
    else:
        with pytest.raises(InvalidValue, match=f"at least {max(other) + 1}"):
            found.numbers(column(other))


@given(st.lists(st.text(max_size=3), min_size=1), st.lists(st.text(max_size=3), max_size=4))
def test_names_are_numbered_in_sorted_order(private: list[str], other: list[str]) -> None:
    found, names = labels(column(private)), sorted(set(private))
    assert found.count == len(names)
    assert [names[number] for number in found.numbers(column(private))] == private
    if set(other) - set(names):
        with pytest.raises(InvalidValue, match="label-column"):
            found.numbers(column(other, Value("string")))


def test_a_class_that_no_private_record_has_counts_where_the_columns_type_has_it() -> None:
    kind = ClassLabel(names=["no", "yes", "perhaps"])
    assert labels(column([0, 1], kind)).count == 3
    assert labels(column([0, 1, 4], Value("int16"))).count == 5


def test_a_number_of_classes_that_is_given_needs_no_private_split() -> None:
    found = labels(None, 4)
    assert found.count == 4
    numbers = found.numbers(column([3, 0]))
    assert numbers.tolist() == [3, 0]
    assert numbers.dtype == np.int64
    with pytest.raises(InvalidValue, match=r"num-classes = 4 .*at least 5: a record is of class 4"):
        found.numbers(column([0, 4]))
    with pytest.raises(AssertionError, match=OPENED):
        found.numbers(column(["a"]))


def test_more_classes_than_names_are_allowed_and_fewer_are_not() -> None:
    private = column(["b", "a", "b"])
    assert labels(private, 5).count == 5
    assert labels(private, 5).numbers(private).tolist() == [1, 0, 1]
    with pytest.raises(InvalidValue, match=r"num-classes = 1 .*at least 2, or 0"):
        labels(private, 1).numbers(private)


def test_a_name_that_the_private_split_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match=r"\['a', 'b'\]; another split has \['c', 'd'\]"):
        labels(column(["b", "a"])).numbers(column(["d", "a", "c"]))
    with pytest.raises(InvalidValue, match=r"\[\]; another split has \['a'\]"):
        labels(column([0, 1])).numbers(column(["a"]))


def test_truth_is_a_class() -> None:
    assert labels(column([True, False])).count == 2
    assert labels(None, 2).numbers(column([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "kind"), [([0.5, 1.0], None), ([[1], [2]], List(Value("int64"))), ([{"a": 1}], None)]
)
def test_what_is_no_class_is_refused_with_its_type(values: Sequence[Any], kind: Any) -> None:
    dataset = column(values, kind)
    assert with_class(dataset, "kind").tolist() == list(range(len(values)))
    with pytest.raises(InvalidValue, match=r"label-column = 'kind' .*whole numbers or text, not"):
        labels(None, 2).numbers(dataset)


def test_a_column_that_is_not_there_is_refused_with_the_nearest() -> None:
    other = Dataset.from_dict({"kinds": [0], "text": ["a"]})
    with pytest.raises(InvalidValue, match="did you mean 'kinds'"):
        labels(None, 2).numbers(other)
    assert with_class(other, "kind").tolist() == [0]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0, -1, 2, -1], [0, 2]),
        ([0, None, -1, 1], [0, 3]),
        (["a", None, ""], [0, 2]),
        ([-1, -1], []),
        ([True, False], [0, 1]),
    ],
)
def test_records_without_a_class_are_left_out(values: list[Any], kept: list[int]) -> None:
    assert with_class(column(values), "kind").tolist() == kept
