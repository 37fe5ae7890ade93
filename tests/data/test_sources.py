from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from fedlora_flwr.data import sources
from fedlora_flwr.data.fingerprint import WHOLE, content_digest, files_digest
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue

ROWS = {"text": ["good", "bad", "fine"], "label": [1, 0, 1]}
pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a split in each format."""
    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.table(ROWS)
    pq.write_table(table, folder / "train.parquet")
    for shard in range(2):
        pq.write_table(table.slice(shard, 1), folder / f"test-0000{shard}-of-00002.parquet")
    (folder / "val.csv").write_text("text,label\ngood,1\nbad,0\nfine,1\n")
    (folder / "extra.jsonl").write_text('{"text": "good", "label": 1}\n')
    (folder / "other.json").write_text('[{"text": "good", "label": 1}]')
    (folder / "tabs.tsv").write_text("text\tlabel\nso, so\t0\n")
    (folder / "README.md").write_text("no records")
    return folder


def picture(path: Path, gray: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), gray).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return class folders of pictures: two splits, of which one lacks a class."""
    folder = tmp_path / "pictures"
    for gray, name in enumerate(["train/cat/b.png", "train/cat/a.png", "train/ant/z.png"]):
        picture(folder / name, 10 * gray)
    picture(folder / "train" / "dog" / "only.jpg", 99)
    picture(folder / "test" / "dog" / "x.png", 77)
    (folder / "test" / "dog" / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("train", ["good", "bad", "fine"]),
        ("test", ["good", "bad"]),
        ("val", ["good", "bad", "fine"]),
        ("validation", ["good", "bad", "fine"]),
        ("extra", ["good"]),
        ("other", ["good"]),
        ("tabs", ["so, so"]),
    ],
)
def test_a_split_of_a_folder_in_any_format(folder: Path, split: str, texts: list[str]) -> None:
    dataset = load_split(str(folder), split)

    assert list(dataset["text"]) == texts
    assert set(dataset.column_names) == {"text", "label"}
    assert dataset.cache_files, "the records are mapped from a file, not held in memory"


def test_a_file_is_the_split_that_its_name_says_or_train(folder: Path) -> None:
    assert len(load_split(str(folder / "train.parquet"), "train")) == 3
    assert len(load_split(str(folder / "extra.jsonl"), "train")) == 1
    assert len(load_split(str(folder / "val.csv"), "validation")) == 3
    with pytest.raises(InvalidValue, match=r"split = 'test'.*'train'"):
        load_split(str(folder / "train.parquet"), "test")


def test_the_layout_of_the_hub_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / "sst2").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "hub" / "data")
    shutil.copy(
        folder / "train.parquet", tmp_path / "hub" / "sst2" / "train-00000-of-00001.parquet"
    )

    assert len(load_split(str(tmp_path / "hub"), "test")) == 2
    assert len(load_split(str(tmp_path / "hub"), "train", subset="sst2")) == 3
    with pytest.raises(InvalidValue, match="subset = 'sst3'"):
        load_split(str(tmp_path / "hub"), "train", subset="sst3")


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    saved = Dataset.from_dict(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "two"))

    assert load_split(str(tmp_path / "one"), "train")[:] == ROWS
    assert list(load_split(str(tmp_path / "two"), "test")["text"]) == ["bad"]
    with pytest.raises(InvalidValue, match="split = 'test'"):
        load_split(str(tmp_path / "one"), "test")


def test_class_folders_are_numbered_in_sorted_order_over_all_splits(pictures: Path) -> None:
    train, test = (load_split(str(pictures), split) for split in ("train", "test"))

    assert train.features["label"].names == test.features["label"].names == ["ant", "cat", "dog"]
    assert list(train["label"]) == [0, 1, 1, 2]
    assert list(test["label"]) == [2]
    assert [np.asarray(image)[0, 0] for image in train["image"]][:3] == [20, 10, 0]


def test_pictures_are_decoded_only_when_they_are_read(pictures: Path) -> None:
    (pictures / "train" / "cat" / "b.png").write_bytes(b"broken")

    train = load_split(str(pictures), "train")

    assert train[0]["image"].size == (4, 3)
    with pytest.raises(OSError, match=r"b\.png"):
        train[2]


def test_encoded_pictures_of_plain_parquet_are_pictures(pictures: Path, tmp_path: Path) -> None:
    content = (pictures / "test" / "dog" / "x.png").read_bytes()
    rows = {"image": [{"bytes": content, "path": "x"}], "blob": [{"bytes": b"no", "path": "x"}]}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")

    record = load_split(str(tmp_path / "train.parquet"), "train")[0]

    assert np.asarray(record["image"])[0, 0] == 77
    assert record["blob"] == {"bytes": b"no", "path": "x"}


def test_the_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    def fingerprint(place: Path, split: str = "train") -> str:
        return str(load_split(str(place), split)._fingerprint)

    first = fingerprint(folder)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    os.utime(copied / "train.parquet", (1, 1))
    assert fingerprint(copied) == first
    assert fingerprint(folder, "val") != first
    state = (folder / "val.csv").stat()
    before = fingerprint(folder, "val")
    (folder / "val.csv").write_text("text,label\ngood,1\nbad,1\nfine,1\n")
    os.utime(folder / "val.csv", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert fingerprint(folder, "val") != before
    assert list(load_split(str(folder), "val")["label"]) == [1, 1, 1]


def test_a_large_file_is_known_by_samples_and_its_time(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(WHOLE + 10)
    found = [content_digest(path), files_digest([path], tmp_path)]
    os.utime(path, (1, 1))
    found += [content_digest(path), files_digest([path], tmp_path)]
    assert found[0] == found[2]
    assert found[1] != found[3]
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert content_digest(path) != found[0]


def test_a_damaged_copy_is_read_again(folder: Path, empty_cache: Path) -> None:
    load_split(str(folder), "train")
    (copy,) = empty_cache.rglob("datasets/sources/**/*.arrow")
    copy.write_bytes(copy.read_bytes()[:50])

    assert load_split(str(folder), "train")[:] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "allowed"),
    [
        ("train.parquet", b"PAR1 but no more", "a parquet file that can be read"),
        ("train.jsonl", b"{no json", "line 1 is not"),
        ("train.csv", b'a,b\n1,2,3\n"', "line 2 has 3"),
    ],
)
def test_a_broken_file_is_one_error(
    tmp_path: Path, name: str, content: bytes, allowed: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidValue, match=rf"dataset = .*{name}.*{allowed}") as caught:
        load_split(str(tmp_path), "train")
    assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "key", "allowed"),
    [
        (("{set}", "tset"), "split", "did you mean 'test'"),
        (("{set}/nothing", "train"), "dataset", "exists"),
        (("nothing.parquet", "train"), "dataset", "exists"),
        (("../no/such/folder", "train"), "dataset", "exists"),
        (("{set}/README.md", "train"), "dataset", "parquet, CSV"),
        (("{tmp}/void", "train"), "dataset", "parquet, CSV"),
        (("{tmp}/shards", "train"), "dataset", "all shards"),
        (("{tmp}/shards/train-00001-of-00003.parquet", "train"), "dataset", "folder of all shards"),
        (("{tmp}/twice", "train"), "dataset", "one file"),
        (("{tmp}/empty", "train"), "dataset", "records, but it has none"),
        (("{tmp}/empty", "test"), "dataset", "records, but it has none"),
        (("{tmp}/empty", "head"), "dataset", "records, but it has none"),
    ],
)
def test_bad_input_is_named(
    folder: Path, tmp_path: Path, arguments: tuple[str, str], key: str, allowed: str
) -> None:
    for name in ("void", "shards", "twice", "empty"):
        (tmp_path / name).mkdir()
    shutil.copy(folder / "train.parquet", tmp_path / "shards" / "train-00001-of-00003.parquet")
    for name in ("train.parquet", "val.csv"):
        shutil.copy(folder / name, tmp_path / "twice" / f"train{Path(name).suffix}")
    pq.write_table(pa.table(ROWS).slice(0, 0), tmp_path / "empty" / "train.parquet")
    (tmp_path / "empty" / "test.jsonl").touch()
    (tmp_path / "empty" / "head.csv").write_text("text,label\n")
    source = arguments[0].format(set=folder, tmp=tmp_path)

    with pytest.raises(InvalidValue) as caught:
        load_split(source, arguments[1])

    assert caught.value.key == key
    assert allowed in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_noticed_within_seconds(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from fedlora_flwr.errors import InvalidValue\n"
        "from fedlora_flwr.data.sources import load_split\n"
        "try: load_split('someone/something', 'train')\n"
        "except InvalidValue as error: print(error)\n"
    )
    # Nothing listens on port 9; a retrying client would outlast the time limit.
    away = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=away, capture_output=True, text=True, timeout=20
    )
    assert "dataset = 'someone/something'" in run.stdout
    assert "a local file or folder" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "key"),
    [(("tset", ""), "split"), (("train", "other"), "subset"), (("train", ""), "")],
)
def test_what_the_hub_s_library_refuses_is_named(
    tmp_path: Path, arguments: tuple[str, str], key: str
) -> None:
    # The library takes a folder for a repository of the hub.
    pq.write_table(pa.table(ROWS), tmp_path / "train.parquet")
    read: Any = lambda: sources._fetched(str(tmp_path), *arguments)  # noqa: E731
    if not key:
        assert len(read()) == 3
        return
    with pytest.raises(InvalidValue) as caught:
        read()
    assert caught.value.key == key


def test_words_in_csv_files_of_the_hub_stay_words(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nNone,NA\nnull,\nfine,yes\n")
    found = sources._fetched(str(tmp_path), "train", "")
    assert found[:] == {"text": ["None", "null", "fine"], "label": ["NA", None, "yes"]}


def test_a_batch_of_json_may_end_between_whole_numbers_and_others(tmp_path: Path) -> None:
    """Records are read some thousands at a time, and their types are brought together."""
    rows = [{"text": "a", "label": 1, "more": None}] * 10_000
    last = {"text": "b", "label": 2.0, "more": "x", "late": [1]}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, last])))
    found = load_split(str(tmp_path), "train")
    assert found[9_999] == {"text": "a", "label": 1.0, "more": None, "late": None}
    assert found[10_000] == last
    for other in ({**last, "label": True}, {**last, "label": "2"}, {**last, "text": 1}):
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [*rows, other])))
        with pytest.raises(InvalidValue, match=r"train\.jsonl.*columns of one type"):
            load_split(str(tmp_path), "train")


def test_a_cell_may_be_longer_than_the_csv_module_takes(tmp_path: Path) -> None:
    text = "so " * 100_000
    (tmp_path / "train.csv").write_text(f"text,label\n{text},1\n")
    assert load_split(str(tmp_path), "train")[0] == {"text": text, "label": 1}


@pytest.mark.skipif("FEDLORA_DATA" not in os.environ, reason="FEDLORA_DATA names no folder")
def test_real_data() -> None:
    root = Path(os.environ["FEDLORA_DATA"])
    text = load_split(str(root / "sst2"), "train")
    images = load_split(str(root / "cifar10"), "test")
    assert (len(text), sorted(text.unique("label"))) == (67_343, [0, 1])
    assert (len(images), images[7]["image"].size) == (10_000, (32, 32))
    assert len(load_split(str(root / "tiny_imagenet"), "validation")) == 10_000
