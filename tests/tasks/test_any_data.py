"""Two thousand made-up data files: each is read as it was made, or refused by name."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks import sources
from fedlora_flwr.tasks.pixels import pixels
from fedlora_flwr.tasks.sources import load_split
from fedlora_flwr.tasks.text import TextClassification
from fedlora_flwr.tasks.vision import ImageClassification
from tests.tasks.data_oracle import Refused, Table, classes, csv_table, json_table
from tests.tasks.pictures import SIZE, image_config
from tests.tasks.texts import text_config

pytestmark = pytest.mark.usefixtures("empty_cache")
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    # The same files each time; change the count to try others.
    "derandomize": True,
    "phases": [Phase.generate],
}
WORDS = ["None", "NA", "null", "nan", "", " ", "007", "1,000", "2024-01-02", "True", "1e3", "-"]
ODD = ['"', '""', "\n", "\r\n", ",", "\t", "é", "\u2028", "\x85", "𝄞", "'", "\\", "#", ";"]
TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from([*WORDS, *ODD, "so", "fine"]), max_size=4).map("".join),
    st.text(max_size=6),
)
CLASSES = st.sampled_from(
    [
        ["0", "1", "2"],
        ["0", "1", "", "NA"],
        ["1.0", "0.0", ""],
        ["0.5", "1"],
        ["+1", "-1", "0"],
        ["yes", "no", "None", "NA"],
        ["007", "7", "08"],
        ["true", "False", ""],
        ["TRUE", "null"],
        ["1", "x", ""],
        ["1000000", "3"],
        ["", "nan"],
        ["18446744073709551615", "1"],
        ["99999999999999999999", "1"],
        ["inf", "1.5"],
    ]
)
HEADERS = st.sampled_from(
    [
        ["text", "label"],
        ["label", "text"],
        ["id", "text", "label"],
        ["", "text", "label"],
        ["text", "label", "text"],
        ["text", "Label"],
        ["text", "more", "other", "label"],
        ["label", "label"],
        ["text ", "label"],
    ]
)


@st.composite
def rows(draw: st.DrawFn, header: list[str]) -> list[list[str]]:
    """Return cells of records, a class from a few where the header says so."""
    chosen, count = draw(CLASSES), draw(st.integers(0, 7))
    kinds = [st.sampled_from(chosen) if name == "label" else TEXTS for name in header]
    return [[draw(kind) for kind in kinds] for _ in range(count)]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file as it is, mostly, or cut off, or with bytes changed."""
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "byte", "doubled"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:place]
    if how == "byte":
        return content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return content[:place] + content if how == "doubled" else content


@st.composite
def csv_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["train.csv", "train.tsv", "train.CSV"]))
    separator, header = "\t" if name.endswith("tsv") else ",", draw(HEADERS)
    stream = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    for row in [header, *draw(rows(header))]:
        if draw(st.integers(0, 40)) == 0:
            row = row[:-1] if draw(st.booleans()) else [*row, "x"]
        writer.writerow(row)
        if draw(st.integers(0, 20)) == 0:
            stream.write(end)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "latin-1", "utf-16"]))
    content = stream.getvalue().encode(encoding, "ignore")
    return name, draw(damaged(content))


@st.composite
def json_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["train.jsonl", "train.json", "train.ndjson"]))
    header = draw(HEADERS)
    keys, lines = list(dict.fromkeys(header)), []
    numeric = draw(st.booleans())
    for row in draw(rows(keys)):
        record: dict[str, Any] = dict(zip(keys, row, strict=True))
        if numeric and "label" in record:
            record["label"] = _plain(record["label"])
        for key in keys:
            if draw(st.integers(0, 15)) == 0:
                record[key] = draw(st.sampled_from([None, 1, "a", 2.5, True, ["a"], {"b": "c"}]))
            elif draw(st.integers(0, 15)) == 0:
                del record[key]
        lines.append(json.dumps(record, ensure_ascii=draw(st.booleans())))
        if draw(st.integers(0, 30)) == 0:
            lines[-1] = lines[-1].replace("{", '{"label": 1, ', 1)
    if name == "train.json":
        text = "[" + draw(st.sampled_from([",", ",\n", " ,\r\n "])).join(lines) + "]"
    else:
        text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16"]))
    return name, draw(damaged(text.encode(encoding, "surrogatepass")))


def _plain(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return None if cell == "" else cell


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
        assert file in str(caught.value) and "\n" not in str(caught.value)
        return "refused"
    dataset = opened(folder, copied=copied)
    assert dataset.column_names == list(expected.columns)
    for name, values in expected.columns.items():
        assert_same(list(dataset[name]), values)
    return compare_classes(folder, file, dataset, expected)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, float) and math.isnan(one):
            assert other is None or math.isnan(other)
        elif isinstance(one, dict):
            assert other is not None and {k: v for k, v in one.items() if v is not None} == other
        else:
            assert one == other and (one is None) == (other is None), (one, other)
            assert isinstance(one, bool) == isinstance(other, bool)


def compare_classes(folder: Path, file: str, dataset: Dataset, expected: Table) -> str:
    task = TextClassification(text_config("no-model", folder))
    task._sources["train"] = dataset
    # A column without a name cannot be asked for.
    texts = [name for name in expected.texts if name not in ("label", "")]
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
        assert file in str(caught.value) and "\n" not in str(caught.value)
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
    assert min(seen["read"], seen["refused"]) > 100, seen


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
    assert min(seen["read"], seen["refused"]) > 100, seen


LABELS = st.sampled_from(
    [
        (st.integers(0, 3), pa.int64()),
        (st.integers(-1, 5), pa.int8()),
        (st.integers(0, 2), pa.uint16()),
        (st.sampled_from([0.0, 1.0, -1.0, math.nan]), pa.float64()),
        (st.sampled_from([0.5, 1.0]), pa.float32()),
        (st.booleans(), pa.bool_()),
        (st.sampled_from(WORDS), pa.string()),
        (st.sampled_from(["yes", "no", "NA"]), pa.large_string()),
        (st.sampled_from(["yes", "no", "None"]), pa.dictionary(pa.int8(), pa.string())),
        (st.just(datetime(2024, 1, 2)), pa.timestamp("ms")),
        (st.sampled_from([1, 2**40]), pa.int64()),
    ]
)


@st.composite
def parquet_files(draw: st.DrawFn) -> tuple[bytes, Table | None]:
    """Return a file, and the table that it holds, or ``None`` where it is not whole."""
    count, header = draw(st.integers(0, 7)), draw(HEADERS)
    arrays, columns = [], {}
    for name in header:
        kind, form = draw(LABELS) if name == "label" else (TEXTS, pa.string())
        gaps = st.one_of(kind, st.none()) if draw(st.booleans()) else kind
        values = draw(st.lists(gaps, min_size=count, max_size=count))
        arrays.append(pa.array(values, form))
        columns[name] = values
    stream, table = io.BytesIO(), pa.Table.from_arrays(arrays, names=header)
    groups = draw(st.sampled_from([1, 3, 100]))
    pq.write_table(table, stream, row_group_size=groups, compression="none")
    content = stream.getvalue()
    if draw(st.integers(0, 5)) == 0:
        return content[: draw(st.integers(0, len(content) - 1))], None
    whole = count and len(columns) == len(header)
    return content, Table(columns, [name for name in header if name != "label"]) if whole else None


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
    assert min(seen["read"], seen["refused"]) > 80, seen


PLACES = st.sampled_from(
    [
        "{}/{}.png",
        "{}/{}.PNG",
        "{}/{}.txt",
        "{}/.{}.png",
        "{}/more/{}.png",
        "{}{}.png",
        ".{}/{}.png",
    ]
)
FOLDERS = st.sampled_from(["a", "B", "c d", "007", "None", "\u00e9"])


def grey(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, "PNG")
    return stream.getvalue()


@st.composite
def picture_folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Return files by their places; a picture's grey is told by its name, some are broken."""
    found = {}
    for number in range(draw(st.integers(1, 6))):
        content = grey(number)
        if draw(st.integers(0, 12)) == 0:
            content = content[: draw(st.integers(0, len(content) - 20))]
        found[draw(PLACES).format(draw(FOLDERS), number)] = content
    return found


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
    assert min(seen["read"], seen["refused"]) > 30, seen


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
    broken = [name for name in used if len(files[name]) < len(grey(0)) - 10]
    if not used or broken:
        with pytest.raises(InvalidValue) as caught:
            decoded_greys(task)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert not broken or str(folder / "train" / broken[0]) in str(caught.value)
        return "refused"
    account = task.private_reading()
    assert account.found == account.used == len(used)
    others = [note.partition(": ")[2].partition(",")[0] for note in account.notes]
    empty = [name for name in names if not any(each.startswith(f"{name}/") for each in used)]
    strangers = [name for name in files if name not in used and not hidden_text(name)]
    assert sum(map(int, others)) == len(strangers) + len(empty)
    assert decoded_greys(task) == [int(parts[name][1].split(".")[0]) for name in used]
    numbers = task._labels.numbers(task._train).tolist()
    assert [names[number] for number in numbers] == [parts[name][0] for name in used]
    assert task.num_classes == len(names)
    return "read"


def hidden_text(name: str) -> bool:
    return name.endswith(".txt") and any(part.startswith(".") for part in name.split("/"))


def decoded_greys(task: ImageClassification) -> list[int]:
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
