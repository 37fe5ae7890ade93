"""A class has the same number on every device, in every split and in every form of data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from fedlora_flwr.data.records import Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.image_classification import ImageClassification
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones.checkpoints import write_split
from tests.data.pictures import CLASSES, image_config, write_pictures
from tests.tasks.texts import text_config

pytestmark = pytest.mark.usefixtures("empty_cache")
Checkpoint = Callable[[str], Path]
NAMES = ["bad", "good", "mixed"]


def labels(records: Records) -> list[int]:
    return records.batch(torch.arange(len(records)))["label"].tolist()


def write_numbered(path: Path, classes: Sequence[str], order: Sequence[str]) -> None:
    """Write a parquet file whose type names its numbers in an order of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(order))})
    rows = [{"text": f"so {name}", "label": order.index(name)} for name in classes]
    pq.write_table(Dataset.from_list(rows, features=features).data.table, path)


@pytest.fixture
def make_task(checkpoint: Checkpoint) -> Callable[..., TextClassification]:
    return lambda folder, **changes: TextClassification(
        text_config(checkpoint("bert"), folder, **changes)
    )


@pytest.mark.parametrize("held", [["good"], ["mixed", "good"], ["mixed", "bad", "good"]], ids=str)
@pytest.mark.parametrize("form", ["text", "numbered", "numbered otherwise"])
def test_a_device_that_holds_some_classes_numbers_them_as_all_do(
    make_task: Callable[..., TextClassification], tmp_path: Path, held: list[str], form: str
) -> None:
    if form == "text":
        write_split(tmp_path, "train", [{"text": "so", "label": name} for name in held])
    else:
        order = sorted(held) if form == "numbered" else sorted(NAMES, reverse=True)
        write_numbered(tmp_path / "train.parquet", held, order)
    task = make_task(tmp_path, class_names="bad, good, mixed")
    assert labels(task.client_records(0, 1)) == [NAMES.index(name) for name in held]
    assert task.build_model().get_submodule("classifier").out_features == 3


@pytest.mark.parametrize("stated", [{}, {"num_classes": 3}, {"class_names": "bad,good,mixed"}])
def test_a_test_split_with_another_order_is_read_by_name(
    make_task: Callable[..., TextClassification], tmp_path: Path, stated: dict[str, Any]
) -> None:
    held = ["mixed", "bad", "good", "good"]
    write_numbered(tmp_path / "train.parquet", held, NAMES)
    write_numbered(tmp_path / "validation.parquet", held, ["good", "mixed", "bad"])
    task = make_task(tmp_path, **stated)
    expected = [NAMES.index(name) for name in held]
    assert labels(task.test_records()) == expected
    assert labels(make_task(tmp_path, **stated).client_records(0, 1)) == expected


@pytest.mark.parametrize("stated", [{}, {"class_names": "bad,good"}])
def test_an_unknown_class_is_refused_by_name(
    make_task: Callable[..., TextClassification], tmp_path: Path, stated: dict[str, Any]
) -> None:
    write_split(tmp_path, "train", [{"text": "so", "label": name} for name in ("good", "bad")])
    write_split(tmp_path, "validation", [{"text": "so", "label": "superb"}])
    with pytest.raises(InvalidValue, match=r"class-names = .* also holds \['superb'\]"):
        make_task(tmp_path, **stated).test_records()
    write_split(tmp_path, "train", [{"text": "so", "label": name} for name in ("good", "worse")])
    if stated:
        with pytest.raises(InvalidValue, match=r"class-names = 'bad,good' .* \['worse'\]"):
            make_task(tmp_path, **stated).client_records(0, 1)


def test_class_folders_are_classes_by_name(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "set")
    shutil.rmtree(folder / "train" / "ant")
    shutil.rmtree(folder / "valid")
    named = ImageClassification(image_config(folder, class_names="cat,bee,ant"))
    assert named.num_classes == len(CLASSES)
    assert labels(named.client_records(0, 1)) == [1] * 8 + [0] * 8
    with pytest.raises(InvalidValue, match=r"class-names = ''.*which 2 class folders cannot"):
        ImageClassification(image_config(folder, num_classes=3)).client_records(0, 1)
    with pytest.raises(InvalidValue, match=r"class-names = 'cat,ant' .*\['bee'\]"):
        ImageClassification(image_config(folder, class_names="cat,ant")).client_records(0, 1)
    complete = ImageClassification(image_config(folder, num_classes=2))
    assert labels(complete.client_records(0, 1)) == [0] * 8 + [1] * 8


def test_numbers_that_are_far_apart_are_refused(
    make_task: Callable[..., TextClassification], tmp_path: Path
) -> None:
    rows = [{"text": "so", "label": label} for label in (1_000_000, 1_000_001)]
    write_split(tmp_path, "train", rows)
    with pytest.raises(InvalidValue, match="Name them with class-names"):
        make_task(tmp_path).build_model()
    task = make_task(tmp_path, class_names="1000000,1000001")
    assert labels(task.client_records(0, 1)) == [0, 1]
    assert task.build_model().get_submodule("classifier").out_features == 2
