from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image

from fedlora_flwr.data import prepared as module
from fedlora_flwr.data.prepared import kept, prepare
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue
from tests.data.preparing import COLUMNS, tokens

COUNT = 700


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [{"text": "ab c " * (i % 5), "row": i, "label": i % 3} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def records(source: Path, empty_cache: Path) -> Dataset:
    return load_split(str(source), "train")


class Counter:
    """Prepares as `tokens` does and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        self.calls += 1
        return tokens(rows)


def results(cache: Path) -> list[Path]:
    return [path.parent for path in (cache / "fedlora" / "datasets").glob("[!.]*/data.arrow")]


def test_results_are_what_the_function_gives_in_order(records: Dataset) -> None:
    found = prepare(records, tokens, {}, COLUMNS)

    assert found.column_names == COLUMNS
    assert len(found) == COUNT
    for row in (0, 255, 256, 699):
        expected = [2, 1] * (row % 5)
        assert found[row]["input_ids"] == expected
        assert found[row]["label"] == row % 3
        np.testing.assert_array_equal(found[row]["pixels"], np.full((3, 2, 4), row % 256))
    assert found.cache_files


def test_the_second_call_reads(records: Dataset) -> None:
    count = Counter()
    first, second = (prepare(records, count, {}, COLUMNS) for _ in range(2))

    assert count.calls == 3, "700 records in batches of 256"
    assert first[:] == second[:]


@pytest.mark.parametrize(
    "change",
    [
        lambda records: prepare(records, tokens, {"length": 2}, COLUMNS),
        lambda records: prepare(records, tokens, {}, COLUMNS[:2]),
        lambda records: prepare(records, tokens, {}, COLUMNS, packages=["numpy"]),
        lambda records: prepare(records.select(range(600)), tokens, {}, COLUMNS),
        lambda records: prepare(records, Counter(), {}, COLUMNS),
    ],
)
def test_what_matters_is_part_of_the_key(
    records: Dataset, empty_cache: Path, change: Callable[[Dataset], Dataset]
) -> None:
    prepare(records, tokens, {}, COLUMNS)
    change(records)
    assert len(results(empty_cache)) == 2


def test_a_changed_file_is_prepared_again_and_a_copy_is_not(
    records: Dataset, source: Path, empty_cache: Path, tmp_path: Path
) -> None:
    prepare(records, tokens, {}, COLUMNS)
    copy = tmp_path / "copy" / "train.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    prepare(load_split(str(copy), "train"), partial(tokens), {}, COLUMNS)
    assert len(results(empty_cache)) == 1

    source.write_text(source.read_text().replace('"label": 2', '"label": 7', 1))
    again = prepare(load_split(str(source), "train"), tokens, {}, COLUMNS)

    assert list(again["label"])[:3] == [0, 1, 7]


def test_an_edited_function_prepares_again(tmp_path: Path, source: Path, empty_cache: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mine\n"
        "from fedlora_flwr.data.prepared import prepare\n"
        "from fedlora_flwr.data.sources import load_split\n"
        f"print(prepare(load_split({str(source)!r}, 'train'), mine.twice, {{}}, ['x'])[3]['x'])\n"
    )
    found = []
    for factor in (2, 3):
        text = f"def twice(rows):\n    return {{'x': [{factor} * row for row in rows['row']]}}\n"
        (tmp_path / "mine.py").write_text(text)
        run = [sys.executable, "-B", "-c", program]
        found.append(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert found == ["6\n", "9\n"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "data.arrow"),
        lambda folder: (folder / "data.arrow").write_bytes(b""),
        lambda folder: (folder / "data.arrow").unlink(),
        lambda folder: (folder / "digest").unlink(),
    ],
)
def test_a_damaged_result_is_made_again_with_a_warning(
    records: Dataset,
    empty_cache: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
) -> None:
    whole = prepare(records, tokens, {}, COLUMNS)[:]
    (folder,) = results(empty_cache)
    damage(folder)

    with caplog.at_level(logging.WARNING):
        again = prepare(records, tokens, {}, COLUMNS)[:]

    assert again == whole
    assert "damaged" in caplog.text


def start(source: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.preparing", str(source)]
    environment = {**os.environ, "TRACE": str(cache / "trace"), "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_prepare_once(source: Path, empty_cache: Path) -> None:
    processes = [start(source, empty_cache) for _ in range(2)]
    files = {process.communicate(timeout=60)[0] for process in processes}

    assert [process.returncode for process in processes] == [0, 0]
    assert len(files) == 1
    trace = (empty_cache / "trace").read_text().split()
    assert len(trace) == 3
    assert len(set(trace)) == 1


def test_a_killed_preparation_leaves_nothing_that_is_used(source: Path, empty_cache: Path) -> None:
    killed, trace = start(source, empty_cache), empty_cache / "trace"
    while not trace.exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    folder = empty_cache / "fedlora" / "datasets"
    assert not results(empty_cache)
    assert len(list(folder.glob(".*"))) == 1, "the draft of the killed process"

    after = start(source, empty_cache)
    after.communicate(timeout=60)

    assert after.returncode == 0
    assert len(results(empty_cache)) == 1
    assert not list(folder.glob(".*"))


def test_a_failing_function_leaves_nothing(records: Dataset, empty_cache: Path) -> None:
    def fail(rows: dict[str, list[Any]]) -> dict[str, Any]:
        if rows["row"][0] > 0:
            raise RuntimeError("no memory")
        return tokens(rows)

    with pytest.raises(RuntimeError, match="no memory"):
        prepare(records, fail, {}, COLUMNS)
    assert not results(empty_cache)
    assert not list((empty_cache / "fedlora" / "datasets").glob(".*"))


def test_trouble_with_the_records_is_not_blamed_on_the_cache(empty_cache: Path) -> None:
    def tables() -> Iterator[Any]:
        yield pa.table({"x": [1]})
        raise PermissionError(13, "Permission denied", "/data/train.csv")

    folder = empty_cache / "fedlora" / "datasets" / "records"
    with pytest.raises(PermissionError, match=r"Permission denied: '/data/train\.csv'$"):
        kept(folder, tables)
    assert not folder.exists()


def test_a_column_keeps_the_type_of_its_first_records(records: Dataset) -> None:
    def mixed(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"x": [str(row) if row > 600 else row for row in rows["row"]]}

    with pytest.raises(InvalidValue, match=r"columns = 'x'.*int64"):
        prepare(records, mixed, {}, ["x"])


@pytest.mark.parametrize("columns", [["inputs"], ["input_ids", "short"]])
def test_a_column_that_does_not_fit_is_named(records: Dataset, columns: list[str]) -> None:
    def some(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokens(rows), "short": [1]}

    with pytest.raises(InvalidValue, match=f"columns = '{columns[-1]}'"):
        prepare(records, some, {}, columns)


def test_a_result_may_have_several_chunks(
    records: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1)
    found = prepare(records, tokens, {}, COLUMNS)
    assert len(found.data.table.to_batches()) == 3
    assert list(found["label"]) == [row % 3 for row in range(COUNT)]


def test_a_broken_picture_is_one_error(tmp_path: Path, empty_cache: Path) -> None:
    folder = tmp_path / "pictures" / "train" / "cat"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"broken")
    pictures = load_split(str(tmp_path / "pictures"), "train")
    with pytest.raises(InvalidValue, match=r"b\.png.*decoded"):
        prepare(pictures, lambda rows: {"x": [i.size[0] for i in rows["image"]]}, {}, ["x"])


def test_a_cache_that_cannot_be_written_to_is_named(
    records: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidValue, match="XDG_CACHE_HOME"):
        prepare(records, tokens, {}, COLUMNS)
