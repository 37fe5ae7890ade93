"""A record that a task cannot take is named with its file, whatever is wrong with it."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedlora_flwr.data.prepared import prepare
from fedlora_flwr.data.unusable import named, naming
from fedlora_flwr.errors import InvalidValue
from tests.tasks import conversations, questions

pytestmark = pytest.mark.usefixtures("empty_cache")
GOOD = questions.row("bali balu", ("bali", 0))


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["bali"], "answer_start": []},
        {"text": ["bali"], "answer_start": [None]},
        {"text": "bali", "answer_start": 0},
    ],
    ids=str,
)
def test_a_question_whose_answer_has_no_place(
    make_questions: questions.Make, tmp_path: Path, answers: dict[str, Any]
) -> None:
    broken = {**GOOD, "answers": answers}
    first = [] if isinstance(answers["text"], str) else [GOOD]  # A column has one type.
    task = make_questions([*first, broken])
    place = f"record {len(first)}, counted from 0, of {tmp_path / 'set' / 'train.jsonl'}"
    with pytest.raises(InvalidValue, match=re.escape(place)) as caught:
        task.client_records(0, 1)
    assert len(str(caught.value).splitlines()) == 1
    assert any("answer is not at its place" in note for note in task._notes(task._train))


def test_a_conversation_that_is_no_text(make_chats: conversations.Make, tmp_path: Path) -> None:
    good = conversations.chat(("user", "bali"), ("assistant", "balu"))
    for messages in (None, [None], [{"role": None, "content": None}]):
        task = make_chats([good, {"messages": messages}])
        with pytest.raises(InvalidValue) as caught:
            task.client_records(0, 1)
        assert str(tmp_path / "set" / "train.jsonl") in str(caught.value)


def test_the_first_record_at_fault_is_named_by_its_place_in_the_file() -> None:
    dataset = Dataset.from_dict({"x": [1, 2, 0, 4, 0]}).select([4, 3, 2, 1])
    dataset.info.dataset_name = "numbers.csv"

    def inverse(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"y": [1 / x for x in rows["x"]]}

    with pytest.raises(InvalidValue, match=r"record 4, counted from 0, of numbers\.csv.*Zero"):
        prepare(dataset, inverse, {}, ["y"])
    assert named(dataset, inverse, [1, 3]) is None
    error = named(dataset, inverse, [1, 2, 3])
    assert error is not None
    assert error.value == "record 2, counted from 0, of numbers.csv"


def test_the_file_is_named_once() -> None:
    dataset = Dataset.from_dict({"x": [datetime.date(2024, 1, 2)]})
    dataset.info.dataset_name = "dates.csv"
    for place, expected in (
        ("here", r"here \(read from dates\.csv\)"),
        ("dates.csv", r"dates\.csv"),
    ):
        with pytest.raises(InvalidValue, match=rf"expected {expected}\.$"), naming(dataset):
            raise InvalidValue("key", 1, place)
