from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora_flwr.data import sources
from fedlora_flwr.data.sources import load_split
from fedlora_flwr.errors import InvalidValue
from tests.data.pictures import picture, write_pictures
from tests.data.watching import opened_in

pytestmark = pytest.mark.usefixtures("empty_cache")
INSIDE, OUTSIDE = "inside", "outside-canary"


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(json.dumps({"text": text, "label": 0}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a data folder with a subset, between folders with records of somebody else's."""
    write(tmp_path / "outside", OUTSIDE)
    write(tmp_path, OUTSIDE)
    write(tmp_path / "set-two", OUTSIDE)
    write(tmp_path / "set" / "part", INSIDE)
    return write(tmp_path / "set", INSIDE)


LEADS_OUT = ["..", "../outside", "part/../../outside", "../set-two", "{outside}", "/", "~", "./.."]


@pytest.mark.parametrize("subset", [*LEADS_OUT, "no", "\0", "x" * 5000, "train.jsonl"])
def test_a_subset_is_a_folder_inside(folder: Path, subset: str, tmp_path: Path) -> None:
    subset = subset.format(outside=tmp_path / "outside")
    with opened_in(tmp_path) as opened, pytest.raises(InvalidValue, match="subset") as caught:
        load_split(str(folder), "train", subset=subset)
    assert OUTSIDE not in str(caught.value)
    assert opened == []


@pytest.mark.parametrize("subset", ["part", "part/", "./part", "part/../part"])
def test_a_subset_inside_is_read(folder: Path, subset: str) -> None:
    assert list(load_split(str(folder), "train", subset=subset)["text"]) == [INSIDE]


@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "", "part", "outside", "set-two", "/", "back", "~"])
    ),
    split=st.sampled_from(["train", "../train", "../../outside/train", "/etc/passwd", "*", ".."]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_leads_out(folder: Path, parts: list[str], split: str) -> None:
    link = folder / "part" / "back"
    if not link.exists():
        link.symlink_to(folder, target_is_directory=True)
    with suppress(InvalidValue):
        found = load_split(str(folder), split, subset="/".join(parts))
        assert list(found["text"]) == [INSIDE]


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("what", ["file", "subset", "data", "class", "picture", "gone", "loop"])
def test_links_that_lead_out_are_refused_by_name(
    folder: Path, tmp_path: Path, what: str, absolute: bool
) -> None:
    outside = tmp_path / "outside"
    pictures = write_pictures(folder / "pictures")
    place, target = {
        "file": (folder / "validation.jsonl", outside / "train.jsonl"),
        "subset": (folder / "linked", outside),
        "data": (folder / "part" / "data", outside),
        "class": (pictures / "train" / "elk", outside),
        "picture": (pictures / "train" / "ant" / "zz.png", outside / "x.png"),
        "gone": (folder / "validation.jsonl", tmp_path / "gone" / "x.jsonl"),
        "loop": (folder / "validation.jsonl", folder / "validation.jsonl"),
    }[what]
    picture(1).save(outside / "x.png")
    place.symlink_to(target if absolute else os.path.relpath(target, place.parent))
    if what == "subset":
        with pytest.raises(InvalidValue, match="subset = 'linked'"):
            load_split(str(folder), "train", subset="linked")
    subset = "pictures" if pictures in place.parents else "part" if what == "data" else ""
    split = "validation" if place.suffix == ".jsonl" else "train"
    with pytest.raises(InvalidValue, match=f"'{place.name}' is a link to a place outside"):
        load_split(str(folder), split, subset=subset)


def test_links_inside_and_a_link_to_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "validation.jsonl").symlink_to("train.jsonl")
    (folder / "linked").symlink_to(folder / "part")
    (tmp_path / "elsewhere").symlink_to(folder)
    (tmp_path / "file.jsonl").symlink_to(folder / "train.jsonl")
    (folder / ".hidden").symlink_to(tmp_path / "outside")
    for source, split, subset in (
        (folder, "validation", ""),
        (folder, "train", "linked"),
        (tmp_path / "elsewhere", "train", "part"),
        (tmp_path / "file.jsonl", "train", ""),
    ):
        assert list(load_split(str(source), split, subset=subset)["text"]) == [INSIDE]


def test_a_copy_of_the_hub_s_client_is_read(tmp_path: Path) -> None:
    copy = tmp_path / "datasets--one--two"
    write(copy / "blobs", INSIDE)
    (copy / "blobs" / "train.jsonl").rename(copy / "blobs" / "0123")
    for inner in ("abc", "abc/part"):
        (copy / "snapshots" / inner).mkdir(parents=True)
        target = Path(os.path.relpath(copy / "blobs" / "0123", copy / "snapshots" / inner))
        (copy / "snapshots" / inner / "train.jsonl").symlink_to(target)
    source = copy / "snapshots" / "abc"
    assert list(load_split(str(source), "train")["text"]) == [INSIDE]
    assert list(load_split(str(source), "train", subset="part")["text"]) == [INSIDE]
    (source / "test.jsonl").symlink_to(copy.parent / "test.jsonl")
    with pytest.raises(InvalidValue, match=r"'test\.jsonl' is a link"):
        load_split(str(source), "train")


def test_a_saved_data_set_names_no_file_elsewhere(tmp_path: Path) -> None:
    for name in ("set", "outside"):
        Dataset.from_dict({"text": [name]}).save_to_disk(str(tmp_path / name))
    state = tmp_path / "set" / "state.json"
    (file,) = (tmp_path / "outside").glob("*.arrow")
    for name in (f"../outside/{file.name}", str(file)):
        found = json.loads(state.read_text())
        state.write_text(json.dumps({**found, "_data_files": [{"filename": name}]}))
        with pytest.raises(InvalidValue, match="whose files are all in it"):
            load_split(str(tmp_path / "set"), "train")


def test_pictures_of_a_table_are_in_it(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "x.png")
    inside = {"bytes": (tmp_path / "x.png").read_bytes(), "path": "x.png"}
    features = datasets.Features({"image": datasets.Image()})
    for path in (str(tmp_path / "x.png"), "http://127.0.0.1:9/x.png"):
        rows = [inside, {"bytes": None, "path": path}]
        named = Dataset.from_dict({"image": rows}, features=features)
        pq.write_table(named.data.table, tmp_path / "set.parquet")
        plain = pa.table({"image": pa.array(rows)})
        pq.write_table(plain, tmp_path / "plain.parquet")
        for file in ("set.parquet", "plain.parquet"):
            with pytest.raises(InvalidValue, match="column 'image' only names some"):
                load_split(str(tmp_path / file), "train")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/x.csv", "\0", "x" * 5000, "a/..b/../.."])
def test_a_source_that_no_file_can_be_is_refused(source: str) -> None:
    with pytest.raises(InvalidValue, match="dataset = "):
        load_split(source, "train")


@pytest.mark.parametrize("name", ["a/..", "a..b", "a/.b", "../a", "a/b/c", ".a"])
def test_what_is_no_name_of_the_hub_is_not_asked_for(name: str) -> None:
    assert not sources.is_hub_name(name)
    assert sources.is_hub_name("a_b.c/d-e.f")


@pytest.mark.parametrize(
    ("split", "subset", "key"),
    [
        ("train+test", "", "split"),
        ("train[:1]", "", "split"),
        ("all", "", "split"),
        ("../x", "", "split"),
        ("train", "../..", "subset"),
        ("train", "/etc", "subset"),
        ("train", "a/b", "subset"),
    ],
)
def test_the_hub_s_library_is_asked_for_names_only(
    monkeypatch: pytest.MonkeyPatch, split: str, subset: str, key: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidValue, match=f"^{key} = .*name of a {key}"):
        load_split("some/set", split, subset=subset)
