from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora_flwr.data.labels import Labels, near_names, without_class
from fedlora_flwr.errors import InvalidValue

OPENED = "the private split was opened"


def column(values: Sequence[Any], kind: Any = None) -> Dataset:
    features = None if kind is None else Features({"kind": kind})
    return Dataset.from_dict({"kind": list(values)}, features=features)


def labels(
    private: Dataset | None,
    num_classes: int = 0,
    names: Sequence[str] = (),
    schema: Dataset | None = None,
) -> Labels:
    """Return labels of a private split; with ``schema`` only its columns may be looked at."""

    def opened() -> Dataset:
        assert private is not None, OPENED
        return private

    known = private if schema is None else schema
    columns = None if known is None else known.features
    return Labels(opened, lambda: columns, "kind", num_classes, names)


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
        with pytest.raises(InvalidValue, match="class-names = ''"):
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
    with pytest.raises(InvalidValue, match=r"= 4 .*at least 5, as a record has class 4"):
        found.numbers(column([0, 4]))


def test_text_is_not_numbered_by_the_records_that_are_there() -> None:
    """One device has all classes, another some of them: each would number them its own way."""
    private = column(["good", "good"])
    for each in (private, None):
        with pytest.raises(InvalidValue, match=r"class-names = '' .*2 classes .*'kind' holds text"):
            labels(each, 2).numbers(private)
    assert labels(private, 2).count == 2


@given(
    st.lists(st.text(max_size=4), min_size=1, max_size=6, unique=True),
    st.data(),
    st.sampled_from(["text", "numbered names"]),
)
def test_names_that_are_given_number_any_split(
    names: list[str], data: st.DataObject, form: str
) -> None:
    held = data.draw(st.lists(st.sampled_from(names), min_size=1))
    if form == "text":
        dataset = column(held, Value("string"))
    else:
        own = data.draw(st.permutations(sorted(set(held))))
        # The library makes such names up, and they name nothing.
        assume(own != [str(number) for number in range(len(own))])
        dataset = column([own.index(name) for name in held], ClassLabel(names=own))
    found = labels(None, data.draw(st.sampled_from([0, len(names)])), names)
    assert found.count == len(names)
    assert [names[number] for number in found.numbers(dataset)] == held
    assert len(labels(None, 0, [*names, "another one"]).numbers(dataset)) == len(held)
    others = labels(None, 0, [*(name for name in names if name != held[0]), "another one"])
    with pytest.raises(InvalidValue, match=r"(?s)class-names = .*another one.* also holds"):
        others.numbers(dataset)


def test_numbers_are_positions_among_names_or_names_themselves() -> None:
    values = column([1, 0, 1])
    assert labels(None, 0, ["no", "yes"]).numbers(values).tolist() == [1, 0, 1]
    assert labels(None, 0, ["1", "0"]).numbers(values).tolist() == [0, 1, 0]
    far = column([1_000_001, 1_000_000])
    assert labels(None, 0, ["1000000", "1000001"]).numbers(far).tolist() == [1, 0]
    assert labels(None, 0, ["no", "yes"]).numbers(column([0, 1], ClassLabel(2))).tolist() == [0, 1]
    # The library calls a class without a name "0"; and somebody may have called one so.
    assert labels(None, 0, ["no", "0"]).numbers(column([0], ClassLabel(1))).tolist() == [1]
    truth = column([True, False])
    assert labels(None, 0, ["True", "false"]).numbers(truth).tolist() == [0, 1]
    assert labels(None, 0, ["no", "yes"]).numbers(truth).tolist() == [1, 0]
    with pytest.raises(InvalidValue, match=r"class-names = 'no,yes' .*as a record has class 2"):
        labels(None, 0, ["no", "yes"]).numbers(column([2]))
    with pytest.raises(InvalidValue, match=r"class-names = '1,0' .*\['5'\]"):
        labels(None, 0, ["1", "0"]).numbers(column([1, 5]))


def test_names_that_a_type_gives_are_followed_across_splits() -> None:
    train = column([0, 1, 2], ClassLabel(names=["no", "yes", "perhaps"]))
    other = column([0, 1, 2], ClassLabel(names=["perhaps", "no", "yes"]))
    for count in (0, 3):
        found = labels(train if count == 0 else None, count, schema=train)
        assert found.count == 3
        assert found.numbers(train).tolist() == [0, 1, 2]
        assert found.numbers(other).tolist() == [2, 0, 1]
        assert found.numbers(column(["yes", "no"])).tolist() == [1, 0]
    with pytest.raises(InvalidValue, match=r"class-names = '' .* also holds \['maybe'\]"):
        labels(train).numbers(column([1], ClassLabel(names=["no", "maybe"])))
    # A server without the private split has its own order.
    assert labels(None, 3).numbers(other).tolist() == [0, 1, 2]


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"num-classes = 3 .*0 or 2, the number of names"):
        labels(None, 3, ["a", "b"])
    with pytest.raises(InvalidValue, match=r"class-names = 'a,b,a' .*each name once"):
        labels(None, 0, ["a", "b", "a"])


def test_numbers_that_are_far_apart_do_not_make_a_huge_classifier() -> None:
    far = column([1_000_000, 1_000_001])
    with pytest.raises(InvalidValue, match=r"2 classes have numbers up to 1000001\. Name them"):
        _ = labels(far).count
    assert labels(column([0, 99])).count == 100
    assert labels(column([*range(20), 199])).count == 200
    assert labels(far, 1_000_002).count == 1_000_002


def test_a_name_that_the_private_split_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match=r"also holds \['c', 'd'\].* has \['a', 'b'\] alone"):
        labels(column(["b", "a"])).numbers(column(["d", "a", "c"]))
    with pytest.raises(
        InvalidValue, match=r"also holds \['a'\], and the private split has numbers"
    ):
        labels(column([0, 1])).numbers(column(["a"]))


def test_truth_is_a_class() -> None:
    assert labels(column([True, False])).count == 2
    assert labels(None, 2).numbers(column([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "kind"), [([0.5, 1.0], None), ([[1], [2]], List(Value("int64"))), ([{"a": 1}], None)]
)
def test_what_is_no_class_is_refused_with_its_type(values: Sequence[Any], kind: Any) -> None:
    dataset = column(values, kind)
    assert without_class(dataset, "kind") == {}
    with pytest.raises(InvalidValue, match=r"label-column = 'kind' .*whole numbers or text, not"):
        labels(None, 2).numbers(dataset)


def test_a_column_that_is_not_there_is_refused_with_the_nearest() -> None:
    other = Dataset.from_dict({"kinds": [0], "text": ["a"]})
    with pytest.raises(InvalidValue, match="did you mean 'kinds'"):
        labels(None, 2).numbers(other)
    assert without_class(other, "kind") == {}


NOTHING, BELOW = "nothing in 'kind'", "a number below 0 in 'kind'"


@pytest.mark.parametrize(
    ("values", "lacking"),
    [
        ([0, -1, 2, -1], {BELOW: [1, 3]}),
        ([0, None, -1, 1], {NOTHING: [1], BELOW: [2]}),
        ([0.0, math.nan, -1.0, 1.0], {NOTHING: [1], BELOW: [2]}),
        ([0.0, None, 1.0], {NOTHING: [1]}),
        (["a", None, ""], {NOTHING: [1]}),
        ([-1, -1], {BELOW: [0, 1]}),
        ([True, False], {}),
        ([True, None], {NOTHING: [1]}),
        ([None, None], {NOTHING: [0, 1]}),
    ],
)
def test_records_without_a_class_are_told_by_the_reason(
    values: list[Any], lacking: dict[str, list[int]]
) -> None:
    found = without_class(column(values), "kind")
    assert {reason: rows.tolist() for reason, rows in found.items()} == lacking


def test_whole_numbers_that_gaps_made_floats_are_classes() -> None:
    found = labels(column([0.0, 2.0, 1.0])).numbers(column([2.0, 0.0]))
    assert found.tolist() == [2, 0]
    assert found.dtype == np.int64
    for value in (0.5, 2.0**53 + 2):
        with pytest.raises(InvalidValue, match="whole numbers or text"):
            labels(None, 2).numbers(column([0.0, value]))
    with pytest.raises(InvalidValue, match="whole numbers or text"):
        labels(None, 2).numbers(Dataset.from_dict({"kind": np.array([2**63], np.uint64)}))


@pytest.mark.parametrize("values", [[1, 2], [True, False]])
def test_numbers_are_no_positions_among_names_that_text_gave(values: list[Any]) -> None:
    text = column(["1", "2", "3"])
    with pytest.raises(InvalidValue, match=r"of text.*\['1', '2', '3'\].*class-names"):
        labels(text).numbers(column(values))
    assert labels(text, names=["1", "2", "3"]).numbers(column([1, 2])).tolist() == [0, 1]


def test_truth_values_and_their_words_are_the_same_classes() -> None:
    found = labels(column(["true", "false"]))
    assert found.numbers(column([True, False])).tolist() == [1, 0]


def test_names_that_are_nearly_the_same_are_told() -> None:
    values = ["Yes", "no", "yes ", None, "a b", "a  b"]
    assert near_names(column(values), "kind") == [["Yes", "yes "], ["a  b", "a b"]]
    assert near_names(column([0, 1], ClassLabel(names=["a", "A"])), "kind") == [["A", "a"]]
    assert near_names(column([0, 1]), "kind") == []
