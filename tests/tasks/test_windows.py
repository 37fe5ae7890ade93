from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fedlora_flwr.tasks.question_answering import QuestionAnswering
from fedlora_flwr.tasks.windows import NO_TARGET, gold_answers, misplaced, training_windows
from tests.backbones import checkpoints
from tests.tasks.questions import (
    LINE,
    SPECIAL,
    messy_rows,
    row,
    windows_of,
)
from tests.tasks.tiny_tasks import WORDS, all_records

pytestmark = pytest.mark.usefixtures("empty_cache")


def target_in(places: list[tuple[int, int] | None], context: str, text: str, begin: int) -> Any:
    """Return the tokens that hold an answer's characters, if all that are not blank are held."""
    wanted = {begin + i for i in range(len(text)) if not context[begin + i].isspace()}
    holding = {
        char: position
        for position, place in enumerate(places)
        for char in (range(*place) if place else ())
        if char in wanted
    }
    return (min(holding.values()), max(holding.values())) if set(holding) == wanted else None


@pytest.mark.parametrize("model", SPECIAL)
@pytest.mark.parametrize("limit", [15, 16, 31, 48])
def test_windows_are_those_cut_by_hand(make_questions: Any, model: str, limit: int) -> None:
    rows = messy_rows(60)
    task = make_questions(rows, model, max_length=limit)
    tokenizer = AutoTokenizer.from_pretrained(task._settings.model)
    trained, tested = (all_records(task, training) for training in (True, False))
    assert len(trained) == len(rows)
    kinds = set()

    position = 0
    for number, (record, private) in enumerate(zip(rows, trained, strict=True)):
        texts = gold_answers(record["answers"])
        cut = list(windows_of(tokenizer, model, record["question"], record["context"], limit))
        found = [target_in(places, record["context"], *a) for _, places in cut for a in texts[:1]]
        chosen = next((i for i, place in enumerate(found) if place), 0)
        target = (found or [None])[chosen] or (0, 0)
        kinds.add((bool(texts), target != (0, 0), min(chosen, 1)))
        for i, (tokens, places) in enumerate(cut):
            window = tested[position]
            assert window["question"] == number
            assert window["input_ids"].tolist() == [tokens]
            plain = [(-1, -1) if place is None else place for place in places]
            assert window["begins"].tolist() == [[begin for begin, _ in plain]]
            assert window["ends"].tolist() == [[end for _, end in plain]]
            assert window["none"] == 0
            here = target if i == chosen else (NO_TARGET, NO_TARGET)
            assert (window["start"], window["end"]) == here
            position += 1
        assert private["input_ids"].tolist() == [cut[chosen][0]]
        assert private["attention_mask"].all()
        assert ("token_type_ids" in private) == (model == "bert")
        if model == "bert":
            asked = cut[chosen][0].index(3) + 1
            told = len(cut[chosen][0]) - asked
            assert private["token_type_ids"].tolist() == [[0] * asked + [1] * told]
        assert (private["start"], private["end"]) == target
        assert not {"question", "begins", "ends", "none"} & set(private)
    assert position == len(tested) > len(rows)
    both = task.test_records().batch(torch.arange(2))
    longest = both["attention_mask"].sum(1).max()
    for name in ("begins", "ends"):
        assert both[name].shape == (2, longest)
        assert (both[name][both["attention_mask"] == 0] == -1).all()
    # Answered, unanswerable, in no window, in a later window: all have occurred.
    assert kinds >= {(False, False, 0), (True, True, 0), (True, False, 0), (True, True, 1)}


def test_a_whole_word_answer_is_what_the_target_says(make_questions: Any) -> None:
    context = " ".join(WORDS)
    rows = [row(context, (word, context.index(word)), (WORDS[0], 0)) for word in WORDS]
    task = make_questions(rows, max_length=20)

    windows = [window for window in all_records(task, False) if window["start"] != NO_TARGET]

    for window, word in zip(windows, WORDS, strict=True):
        begin, end = window["begins"][0, window["start"]], window["ends"][0, window["end"]]
        assert context[begin:end] == word


@pytest.mark.parametrize(
    ("pair", "cls_token", "none"),
    [
        ("$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:1", "[CLS]", -1),
        ("$A:0 [SEP]:0 $B:1 [SEP]:1", "[CLS]", 0),
        ("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", None, 0),
    ],
)
def test_no_answer_is_the_class_token_wherever_it_is(
    question_models: dict[str, Path], pair: str, cls_token: str | None, none: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(question_models["bert"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.cls_token = cls_token
    rows: dict[str, list[Any]] = {"question": ["bali"], "context": [LINE], "answers": [None]}

    found = training_windows(rows, tokenizer=tokenizer, limit=30)

    place = none % len(found["input_ids"][0])
    assert found["none"] == found["start"] == found["end"] == [place]


@pytest.mark.parametrize("layout", ["lists", "structs", "parquet", "nothing", "nulls"])
def test_every_layout_of_answers_is_read(make_questions: Any, tmp_path: Path, layout: str) -> None:
    context = "bali dona kulu"
    asked = {"question": "" if layout == "nulls" else "bali"}
    rows = [
        row(context, **asked),
        row(context, ("dona", 5), ("kulu", 10)),
        row(context, ("kulu", 10)),
    ]
    task = make_questions(rows)
    expected = all_records(task, False)
    for record in rows:
        pairs = zip(*record["answers"].values(), strict=True)
        if layout == "structs":
            record["answers"] = [{"text": text, "answer_start": begin} for text, begin in pairs]
        if layout == "nothing" and not record["answers"]["text"]:
            record["answers"] = None
        if layout == "nulls" and not record["answers"]["text"]:
            record["answers"] = {"text": None, "answer_start": None}
            record["question"] = None
    folder = tmp_path / "set"
    for path in folder.iterdir():
        path.unlink()
    for split in ("train", "validation"):
        if layout == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        else:
            checkpoints.write_split(folder, split, rows)

    again = QuestionAnswering(task._settings)

    assert [{k: v.tolist() for k, v in found.items()} for found in all_records(again, False)] == [
        {k: v.tolist() for k, v in found.items()} for found in expected
    ]
    assert again._golds == [[], ["dona", "kulu"], ["kulu"]]


def test_a_tokenizer_with_a_truncation_of_its_own_makes_the_same_windows_once(
    make_questions: Any, question_models: dict[str, Path], tmp_path: Path, empty_cache: Path
) -> None:
    rows, limits = messy_rows(20), {"direction": "Left", "max_length": 9, "stride": 0}
    expected = [window["input_ids"].tolist() for window in all_records(make_questions(rows), False)]
    folder = tmp_path / "truncating"
    shutil.copytree(question_models["bert"], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {**limits, "strategy": "LongestFirst"}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))

    for order in ((False, True), (True, False)):
        task = make_questions(rows, model=folder)
        found = {training: all_records(task, training) for training in order}
        assert [window["input_ids"].tolist() for window in found[False]] == expected
        # The second task finds what the first has made, whichever split it asks for first.
        assert len([*empty_cache.glob("fedlora/datasets/*.lock")]) == 3
    assert len(all_records(make_questions(rows, max_length=16), False)) > len(expected)


def test_answers_that_are_not_where_they_should_be_are_counted() -> None:
    rows = [
        row("one two", ("two", 4)),
        row("one two", ("two", 5)),  # Counted from 1, or in bytes.
        row("one two"),
        row("one two", ("one", 0), ("two", 9)),
        row("one two", ("three", 4)),
    ]
    assert misplaced(Dataset.from_list(rows)) == 2
