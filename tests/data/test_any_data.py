"""Two thousand made-up data files: each is read as it was made, or refused by name."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings

from fedlora_flwr.data import sources
from fedlora_flwr.data.pictures import pixels
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.image_classification import ImageClassification
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.data.data_files import csv_files, gray, json_files, parquet_files, picture_folders
from tests.data.data_oracle import Refused, Table, classes, csv_table, json_table
from tests.data.pictures import SIZE, image_config
from tests.tasks.texts import text_config

pytestmark = pytest.mark.usefixtures("empty_cache")
QUIET: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    # The same files each time; change the count to try others.
    "derandomize": True,
    "phases": [Phase.generate],
}


def opened(folder: Path, *, copied: bool) -> Dataset:
    """Read a split as the package does, or without the copy in the cache, which takes longest."""
    if copied:
        return load_split(str(folder), "train")
    found = sources._found(folder, str(folder), "train", "")
    tables = list(sources._READERS[found.kind](found.paths))
    if not sum(len(table) for table in tables):
        raise InvalidValue("source", str(found.paths[0]), "records")
    dataset = sources._with_images(Dataset(pa.concat_tables(tables), fingerprint="none"))
    dataset.info.dataset_name = str(found.paths[0])
    return dataset


def compare(folder: Path, file: str, oracle: Callable[[], Table], *, copied: bool = False) -> str:
    """Read a file and compare it with what it holds; return what came of it."""
    try:
        expected = oracle()
    except Refused:
        with pytest.raises(InvalidValue) as caught:
            opened(folder, copied=copied)
        assert_sentence(caught.value, file)
        return "refused"
    dataset = opened(folder, copied=copied)
    assert dataset.column_names == list(expected.columns)
    for name, values in expected.columns.items():
        assert_same(list(dataset[name]), values)
    return compare_classes(folder, file, dataset, expected)


def assert_sentence(error: InvalidValue, file: str) -> None:
    assert file in str(error)
    assert len(str(error).splitlines()) == 1


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, float) and math.isnan(one):
            assert other is None or math.isnan(other)
        elif isinstance(one, dict):
            assert other is not None
            assert {k: v for k, v in one.items() if v is not None} == other
        else:
            assert one == other
            assert isinstance(one, bool) == isinstance(other, bool)


def compare_classes(folder: Path, file: str, dataset: Dataset, expected: Table) -> str:
    task = TextClassification(text_config("no-model", folder))
    task._sources["train"] = dataset
    # A column without a name cannot be asked for.
    # A record's own name is no text to learn from.
    texts = [name for name in expected.texts if name not in ("label", "", "id")]
    try:
        held = expected.columns["label"]
        if (
            any(isinstance(value, list | dict | datetime) for value in held)
            or not 1 <= len(texts) <= 2
        ):
            raise Refused("no such columns")
        used, kept = classes(held)
    except (Refused, KeyError, OverflowError):
        with pytest.raises(InvalidValue) as caught:
            task.private_reading()
        assert_sentence(caught.value, file)
        return "refused"
    account = task.private_reading()
    assert (account.found, account.used) == (len(expected), len(used))
    assert sum(account.left_out.values()) == len(expected) - len(used)
    assert account.columns == tuple(texts)
    assert_same(list(task._train[texts[0]]), [expected.columns[texts[0]][row] for row in used])
    numbers = task._labels.numbers(task._train).tolist()
    if isinstance(kept[0], str):
        names = sorted(set(kept))
        assert [names[number] for number in numbers] == kept
        assert task.num_classes == len(names)
    else:
        assert numbers == [int(value) for value in kept]
        assert task.num_classes == max(numbers) + 1
    return "read"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def put(folder: Path, name: str, content: bytes) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / name).write_bytes(content)


def test_csv_files(place: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=800, **QUIET)
    @given(csv_files())
    def check(made: tuple[str, bytes]) -> None:
        name, content = made
        put(place, name, content)
        separator = "\t" if name.endswith("tsv") else ","
        seen[compare(place, name, lambda: csv_table(content, separator))] += 1

    check()
    assert min(seen["read"], seen["refused"]) > 50, seen


def test_json_files(place: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=600, **QUIET)
    @given(json_files())
    def check(made: tuple[str, bytes]) -> None:
        name, content = made
        put(place, name, content)
        array = name == "train.json"
        seen[compare(place, name, lambda: json_table(content, array=array))] += 1

    check()
    assert min(seen["read"], seen["refused"]) > 50, seen


def test_parquet_files(place: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, **QUIET)
    @given(parquet_files())
    def check(made: tuple[bytes, Table | None]) -> None:
        content, table = made
        put(place, "train.parquet", content)

        def oracle() -> Table:
            if table is None:
                raise Refused("not whole")
            return table

        seen[compare(place, "train.parquet", oracle)] += 1

    check()
    assert min(seen["read"], seen["refused"]) > 40, seen


def test_folders_of_pictures(place: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=200, **QUIET)
    @given(picture_folders())
    def check(files: dict[str, bytes]) -> None:
        shutil.rmtree(place)
        for name, content in files.items():
            (place / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "train" / name).write_bytes(content)
        seen[compare_pictures(place, files)] += 1

    check()
    assert min(seen["read"], seen["refused"]) > 15, seen


def compare_pictures(folder: Path, files: dict[str, bytes]) -> str:
    parts = {name: name.split("/") for name in files}
    names = sorted({part[0] for part in parts.values() if len(part) > 1 and part[0][0] != "."})
    used = sorted(
        name
        for name, part in parts.items()
        if len(part) == 2
        and not any(each.startswith(".") for each in part)
        and name.lower().endswith(".png")
    )
    task = ImageClassification(image_config(folder))
    broken = [name for name in used if len(files[name]) < len(gray(0)) - 10]
    if not used or broken:
        with pytest.raises(InvalidValue) as caught:
            decoded_grays(task)
        assert_sentence(caught.value, str(folder / "train" / broken[0] if broken else folder))
        return "refused"
    account = task.private_reading()
    assert account.found == account.used == len(used)
    others = [note.partition(": ")[2].partition(",")[0] for note in account.notes]
    empty = [name for name in names if not any(each.startswith(f"{name}/") for each in used)]
    strangers = [name for name in files if name not in used and not hidden_text(name)]
    assert sum(map(int, others)) == len(strangers) + len(empty)
    assert decoded_grays(task) == [int(parts[name][1].split(".")[0]) for name in used]
    numbers = task._labels.numbers(task._train).tolist()
    assert [names[number] for number in numbers] == [parts[name][0] for name in used]
    assert task.num_classes == len(names)
    return "read"


def hidden_text(name: str) -> bool:
    return name.endswith(".txt") and any(part.startswith(".") for part in name.split("/"))


def decoded_grays(task: ImageClassification) -> list[int]:
    return [
        int(value) for value in np.array(pixels(task._train, "image", SIZE)["image"])[:, 0, 0, 0]
    ]


def test_the_copy_in_the_cache_is_what_was_read(place: Path) -> None:
    """The same files on the way that a run takes, with a copy on disk; that costs more time."""

    @settings(max_examples=40, **QUIET)
    @given(csv_files(), json_files())
    def check(table: tuple[str, bytes], objects: tuple[str, bytes]) -> None:
        name, content = table
        put(place, name, content)
        separator = "\t" if name.endswith("tsv") else ","
        compare(place, name, lambda: csv_table(content, separator), copied=True)
        other, text = objects
        put(place, other, text)
        compare(place, other, lambda: json_table(text, array=other == "train.json"), copied=True)

    check()
