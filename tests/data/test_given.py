"""Tables that a caller in Python gives instead of files."""

from __future__ import annotations

from typing import Any

import datasets
import pandas as pd
import pytest

from fedlora_flwr.data.given import as_dataset
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import holding

FRAME = pd.DataFrame({"text": ["one", None, "three"], "label": [0, 1, 1]}, index=[7, 8, 9])


def test_a_frame_has_its_columns_and_a_fingerprint_of_its_content() -> None:
    found = as_dataset(FRAME, "train")
    assert found.to_dict() == {"text": ["one", None, "three"], "label": [0, 1, 1]}
    assert as_dataset(FRAME.reset_index(drop=True), "test")._fingerprint == found._fingerprint
    others = (FRAME.assign(label=[0, 1, 0]), FRAME.rename(columns={"text": "words"}), FRAME[:2])
    prints = {as_dataset(other, "train")._fingerprint for other in others}
    assert len(prints | {found._fingerprint}) == 4


def test_categories_are_texts_as_in_a_file() -> None:
    found = as_dataset(FRAME.assign(label=pd.Categorical(["b", "a", "b"])), "train")
    assert found.features["label"] == datasets.Value("string")
    assert found["label"][:] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            [1, 2],
            "train = 'list' cannot be used: expected a pandas DataFrame or a datasets.Dataset",
        ),
        (FRAME.assign(label=[0, "a", 1.5]), "a table with one type per column"),
    ],
)
def test_what_is_no_table_is_told(table: Any, said: str) -> None:
    with pytest.raises(InvalidValue) as told:
        as_dataset(table, "train")
    assert said in str(told.value)


def test_a_held_table_is_a_data_set_until_it_is_let_go() -> None:
    with holding({"train": as_dataset(FRAME, "train")}, "data") as name:
        assert len(load_split(name, "train")) == 3
        with pytest.raises(InvalidValue, match="split = 'test' cannot be used: expected one of"):
            load_split(name, "test")
    with pytest.raises(InvalidValue, match="Give the object again"):
        load_split(name, "train")
