from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fedlora_flwr.data import splits_apart
from fedlora_flwr.data.splits_apart import check_records_apart, record_digests
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.image_classification import ImageClassification
from fedlora_flwr.tasks.instruction_tuning import InstructionTuning
from fedlora_flwr.tasks.question_answering import QuestionAnswering
from fedlora_flwr.tasks.registry import Task, check_splits_apart
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones.checkpoints import write_split
from tests.data.pictures import image_config, picture, write_pictures
from tests.tasks import conversations, questions
from tests.tasks.fixtures import settings
from tests.tasks.texts import text_config

pytestmark = pytest.mark.usefixtures("empty_cache")
Row = dict[str, Any]


def texts(first: int, count: int, label: int = 0) -> list[Row]:
    return [{"text": f"text {i}", "label": label} for i in range(first, first + count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "set", "train", texts(0, 600))
    write_split(tmp_path / "set", "validation", texts(600, 300))
    return tmp_path / "set"


def text_task(folder: Path, **changes: Any) -> TextClassification:
    # No model is needed to compare records.
    return TextClassification(text_config("no-model", folder, num_classes=2, **changes))


def refused(task: Task, words: str, split: str = "validation") -> None:
    with pytest.raises(InvalidValue, match=words) as caught:
        check_splits_apart(task)
    assert (caught.value.key, caught.value.value) == ("test-split", split)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        kind = pa.schema([("label", pa.int8()), ("text", pa.large_string()), ("more", pa.int64())])
        pq.write_table(pa.Table.from_pylist(list(rows), kind), path, row_group_size=7)
    elif path.suffix == ".csv":
        lines = [f'"{row["text"]}",{row["label"]}' for row in rows]
        path.write_text("\n".join(["text,label", *lines]))
    else:
        write_split(path.parent, path.stem, rows)


def test_splits_without_a_record_in_common_pass(folder: Path) -> None:
    check_splits_apart(text_task(folder))
    write_split(folder, "test", texts(900, 10))
    check_splits_apart(text_task(folder, test_split="validation,test"))
    write_split(folder, "test", texts(599, 10))
    refused(text_task(folder, test_split="validation,test"), "record 0 is record 599", "test")


def test_the_private_split_by_its_own_name_is_refused(folder: Path) -> None:
    refused(text_task(folder, test_split="train"), "'train.jsonl' has the content", "train")
    refused(text_task(folder, test_split="validation,train"), "'train.jsonl'", "train")
    with pytest.raises(InvalidValue, match="test-split = ''"):
        check_splits_apart(text_task(folder, test_split=""))


@pytest.mark.parametrize("how", ["copy", "link", "hard link"])
def test_the_same_file_under_another_name_is_refused(folder: Path, how: str) -> None:
    other = folder / "validation.jsonl"
    other.unlink()
    if how == "copy":
        shutil.copy(folder / "train.jsonl", other)
    elif how == "link":
        other.symlink_to("train.jsonl")
    else:
        other.hardlink_to(folder / "train.jsonl")
    refused(text_task(folder), r"'validation\.jsonl' has the content of 'train\.jsonl'")


def test_a_file_of_the_same_size_and_samples_is_another_file(folder: Path) -> None:
    size = len((folder / "train.jsonl").read_bytes())
    rows = json.dumps({"text": "x" * (size - 40), "label": 0})
    (folder / "validation.jsonl").write_text(rows + " " * (size - len(rows)))
    check_splits_apart(text_task(folder))


def test_the_split_of_a_subset_is_compared_with_its_own(folder: Path) -> None:
    write_split(folder / "part", "train", texts(600, 5))
    write_split(folder / "part", "validation", texts(0, 5))
    check_splits_apart(text_task(folder, dataset_subset="part"))
    (folder / "part" / "test.jsonl").symlink_to("train.jsonl")
    task = text_task(folder, dataset_subset="part", test_split="test")
    refused(task, r"'test\.jsonl' has the content", "test")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("label", [0, 1, -1])
def test_one_record_in_both_is_refused_in_any_form(folder: Path, form: str, label: int) -> None:
    """Another class, or none, does not make another record."""
    (folder / "validation.jsonl").unlink()
    rows = texts(600, 299)
    write(folder / f"validation.{form}", rows)
    check_splits_apart(text_task(folder))
    rows.insert(280, {"text": "text 599", "label": label})
    write(folder / f"validation.{form}", rows)
    refused(text_task(folder), r"its record 280 is record 599 of the private split 'train'")
    # What a limit leaves out is private all the same.
    refused(text_task(folder, train_limit=1, test_limit=1), "record 280 is record 599")


def test_the_same_rows_in_another_order_and_encoding_are_refused(folder: Path) -> None:
    (folder / "validation.jsonl").unlink()
    rows = [{**row, "more": number} for number, row in enumerate(texts(0, 600))]
    random.Random(3).shuffle(rows)
    write(folder / "validation.parquet", rows)
    refused(text_task(folder), "is record 0 of the private .* and 599 more")


def test_saved_data_sets_are_compared(folder: Path, tmp_path: Path) -> None:
    rows = texts(0, 20)
    for split, chosen in (("train", rows), ("validation", texts(40, 5)), ("test", rows[7:8])):
        Dataset.from_list(chosen).save_to_disk(str(tmp_path / "saved" / split))
    shutil.copytree(tmp_path / "saved" / "train", tmp_path / "saved" / "copy")
    check_splits_apart(text_task(tmp_path / "saved"))
    task = text_task(tmp_path / "saved", test_split="test")
    refused(task, "its record 0 is record 7 of", "test")
    task = text_task(tmp_path / "saved", test_split="copy")
    refused(task, r"file 'data-00000-of-00001\.arrow' has the content", "copy")


def test_splits_of_the_hub_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of these there are records only, and no files."""
    splits = {"train": texts(0, 9), "validation": texts(20, 9), "test": texts(3, 1)}

    def opened(name: str, subset: str | None, split: str) -> Dataset:
        return Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", opened)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    check_splits_apart(text_task(Path("some/set")))
    refused(text_task(Path("some/set"), test_split="test"), "record 0 is record 3", "test")


def test_splits_with_other_columns_are_refused(folder: Path) -> None:
    rows = [{**row, "title": "x"} for row in texts(0, 3)]
    write_split(folder, "validation", rows)
    with pytest.raises(InvalidValue, match=r"input-columns = ''.*\['text', 'title'\]"):
        check_splits_apart(text_task(folder))
    refused(text_task(folder, input_columns="text"), "record 0 is record 0")


def test_pairs_are_one_input(folder: Path) -> None:
    write_split(folder, "train", [{"a": "xy", "b": "z", "label": 0}])
    write_split(folder, "validation", [{"b": "yz", "a": "x", "label": 0}])
    check_splits_apart(text_task(folder))
    write_split(folder, "validation", [{"b": "z", "a": "xy", "label": 1}])
    refused(text_task(folder), "record 0 is record 0")


def test_two_splits_are_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_splits_apart(text_task(folder))

    def again(*arguments: object) -> None:
        raise AssertionError("records were compared again")

    monkeypatch.setattr(splits_apart, "record_digests", again)
    check_splits_apart(text_task(folder))
    for split in ("train", "validation"):
        with (folder / f"{split}.jsonl").open("a") as stream:
            stream.write('\n{"text": "one more", "label": 0}')
        with pytest.raises(AssertionError, match="compared again"):
            check_splits_apart(text_task(folder))


@pytest.mark.parametrize("form", ["folders", "table"])
def test_pictures_are_compared_by_their_bytes(tmp_path: Path, form: str) -> None:
    source = write_pictures(tmp_path / "set", train=6, valid=3)
    if form == "table":
        _as_tables(source, tmp_path / "table")

    def task(**changes: Any) -> Task:
        place = source if form == "folders" else tmp_path / "table"
        return ImageClassification(image_config(place, num_classes=3, **changes))

    check_splits_apart(task())
    (private,) = (source / "train" / "bee").glob("0001.png")
    shutil.copy(private, source / "valid" / "cat" / "another-name.png")
    if form == "table":
        _as_tables(source, tmp_path / "table")
    refused(task(), "its record 3 is record 2 of the private split 'train'", "valid")


def _as_tables(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        files = sorted((source / split).rglob("*.png"))
        rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}} for file in files]
        table = pa.Table.from_pylist([{**row, "label": 0} for row in rows])
        pq.write_table(table, folder / f"{split}.parquet")


def test_a_picture_that_was_encoded_anew_is_another(tmp_path: Path) -> None:
    """The promise of the check is about bytes; this is what it does not see."""
    notes = PngInfo()
    notes.add_text("note", "new")
    first, second = io.BytesIO(), io.BytesIO()
    picture(1).save(first, "PNG")
    picture(1).save(second, "PNG", pnginfo=notes)
    rows = [{"image": {"bytes": each.getvalue(), "path": None}} for each in (first, second)]
    features = datasets.Features({"image": datasets.Image()})
    both = Dataset.from_list(rows, features=features)
    assert len(set(record_digests(both, ["image"]))) == 2
    assert isinstance(both[0]["image"], Image.Image)


def test_a_question_is_one_with_its_text(tmp_path: Path) -> None:
    place = tmp_path / "set"
    private = questions.row("one two three", ("two", 4), question="which?")
    write_split(place, "train", [private])
    for other in (
        questions.row("one two three", ("two", 4), question="another?"),
        questions.row("one two", ("two", 4), question="which?"),
    ):
        write_split(place, "validation", [other])
        check_splits_apart(QuestionAnswering(text_config("no-model", place)))
    # Another answer does not make another record.
    write_split(place, "validation", [questions.row("one two three", question="which?")])
    refused(QuestionAnswering(text_config("no-model", place)), "record 0 is record 0")


def test_a_conversation_is_who_says_what(tmp_path: Path) -> None:
    place = tmp_path / "set"
    private = conversations.chat(("user", "one"), ("assistant", "two"))
    write_split(place, "train", [private])
    write_split(place, "validation", [conversations.chat(("user", "one"), ("assistant", "three"))])
    check_splits_apart(InstructionTuning(text_config("no-model", place)))
    turns = [{"content": turn["content"], "role": turn["role"]} for turn in private["messages"]]
    turns[0]["weight"] = "1"
    write_split(place, "validation", [{"topic": "x", "messages": turns}])
    refused(InstructionTuning(text_config("no-model", place)), "record 0 is record 0")


def test_values_differ_where_records_do() -> None:
    values: list[Any] = ["", "t", "null", '""', "[]", "\0", "\0\0", "é", "e\u0301", "A", "a", " a"]
    dataset = Dataset.from_dict({"x": values})
    assert len(set(record_digests(dataset, ["x"]))) == len(values)
    pairs = Dataset.from_dict({"x": ["a", "", "ab", "b"], "y": ["b", "ab", "", "a"]})
    assert len(set(record_digests(pairs, ["x", "y"]))) == 4
    # A selection is read in its own order.
    assert list(record_digests(dataset.select([3, 1]), ["x"])) == [
        list(record_digests(dataset, ["x"]))[place] for place in (3, 1)
    ]


def test_a_missing_text_is_an_empty_one() -> None:
    dataset = Dataset.from_dict({"x": [None, "", "a"]})
    assert len(set(record_digests(dataset, ["x"]))) == 2


def test_a_task_that_cannot_tell_is_refused() -> None:
    check_splits_apart(DigitsTask(settings()))

    class Own:
        name = "own"

    with pytest.raises(InvalidValue, match=r"task = 'own' .*check_splits_apart"):
        check_splits_apart(Own())  # type: ignore[arg-type]


@pytest.mark.skipif("FEDLORA_DATA" not in os.environ, reason="FEDLORA_DATA names no folder")
def test_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(os.environ["FEDLORA_DATA"])
    opened: Callable[[str], Dataset] = lambda split: datasets.load_dataset(  # noqa: E731
        "parquet", data_files=str(root / "sst2" / f"{split}.parquet"), split="train"
    )
    private, test = opened("train"), opened("validation")
    check_records_apart(private, {"validation": test}, ["sentence"], "train")
