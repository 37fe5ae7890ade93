from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from timm.models import save_for_hf

from fedlora_flwr.backbones.image_models import SMALL_SWIN, model_folder
from fedlora_flwr.backbones.pretrain_swin import MODEL_ARGS, build_swin
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.names import names
from fedlora_flwr.data.records import Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.dataset_task import DatasetTask
from fedlora_flwr.tasks.image_classification import ImageClassification
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones.checkpoints import write_split
from tests.data.pictures import image_config, write_pictures
from tests.tasks.texts import records_digest, reviews, state_digest, text_config

Checkpoint = Callable[[str], Path]
Make = Callable[..., TextClassification]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return 40 private reviews and 30 public ones in two splits, each with its own length."""
    for split, rows in (
        ("train", reviews(40)),
        ("validation", reviews(20, 1)),
        ("test", reviews(10, 2)),
    ):
        numbered = [{"text": "so " * i, "label": row["label"]} for i, row in enumerate(rows)]
        write_split(tmp_path / "set", split, numbered)
    return tmp_path / "set"


@pytest.fixture
def make_task(checkpoint: Checkpoint, folder: Path, empty_cache: Path) -> Make:
    def make(model: Path | None = None, **changes: Any) -> TextClassification:
        usual: dict[str, Any] = {"max_length": 64, **changes}
        return TextClassification(text_config(model or checkpoint("bert"), folder, **usual))

    return make


def rows_of(records: Records) -> list[int]:
    """Return which rows records are of: that many words they have, and two tokens more."""
    lengths = records.lengths  # type: ignore[attr-defined]
    return [int(length) - 2 for length in lengths]


def all_of(records: Records) -> dict[str, list[Any]]:
    batch = records.batch(torch.arange(len(records)))
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "json"])
def test_every_form_of_table_gives_the_same_records(
    make_task: Make, folder: Path, form: str
) -> None:
    expected = all_of(make_task().client_records(0, 1))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").unlink()
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    elif form == "csv":
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        (folder / "train.csv").write_text("\n".join(lines))
    else:
        separator = "\n" if form == "jsonl" else ","
        text = separator.join(map(json.dumps, rows))
        (folder / f"train.{form}").write_text(text if form == "jsonl" else f"[{text}]")

    assert all_of(make_task().client_records(0, 1)) == expected


@pytest.mark.parametrize("values", [("no", "yes"), (False, True)], ids=str)
def test_labels_may_be_names(make_task: Make, folder: Path, values: Sequence[Any]) -> None:
    expected = all_of(make_task().test_records())["label"]
    for split in ("train", "validation"):
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        write_split(folder, split, [{**row, "label": values[row["label"]]} for row in rows])
    task = make_task()

    assert task.num_classes == 2
    assert all_of(task.test_records())["label"] == expected
    if isinstance(values[0], str):
        with pytest.raises(InvalidValue, match="class-names = ''"):
            make_task(num_classes=2).test_records()
    named = make_task(num_classes=2, class_names="no, yes")
    assert all_of(named.test_records())["label"] == expected


def test_records_without_a_class_are_dropped(make_task: Make, folder: Path) -> None:
    rows = [{"text": "so " * i, "label": (-1, 0, 1)[i % 3]} for i in range(30)]
    for split in ("train", "validation"):
        write_split(folder, split, rows)
    task = make_task(train_limit=12)

    assert rows_of(task.test_records()) == [i for i in range(30) if i % 3]
    assert all_of(task.test_records())["label"] == [0, 1] * 10
    assert len(task.client_records(0, 1)) == 12
    assert set(rows_of(task.client_records(0, 1))) <= {i for i in range(30) if i % 3}


def test_a_split_without_any_class_is_refused_by_name(make_task: Make, folder: Path) -> None:
    write_split(folder, "test", [{"text": "so", "label": -1}])
    with pytest.raises(InvalidValue, match=r"label-column = 'label' .*split 'test'"):
        make_task(test_split="test").test_records()


def test_classes_beyond_those_there_are_are_refused(make_task: Make, folder: Path) -> None:
    write_split(folder, "test", [{"text": "so", "label": 2}])
    with pytest.raises(InvalidValue, match=r"= 2 .*at least 3, as a record has class 2"):
        make_task(test_split="validation,test").test_records()
    with pytest.raises(InvalidValue, match=r"num-classes = 1 .*at least 2"):
        make_task(num_classes=1).client_records(0, 1)
    task = make_task(test_split="test", num_classes=3)
    assert all_of(task.test_records())["label"] == [2]
    assert task.build_model().get_submodule("classifier").out_features == 3


def test_several_test_splits_are_measured_together_and_one_by_one(make_task: Make) -> None:
    task = make_task(test_split="validation, test")
    model, records = task.build_model(), task.test_records()
    alone = {
        split: task.evaluate(model, make_task(test_split=split).test_records())
        for split in ("validation", "test")
    }

    found = task.evaluate(model, records)

    assert rows_of(records) == [*range(20), *range(10)]
    assert all_of(records)["part"] == [0] * 20 + [1] * 10
    for figure in ("loss", "accuracy"):
        both = [alone[split][figure] for split in ("validation", "test")]
        assert [found[f"{figure}_validation"], found[f"{figure}_test"]] == pytest.approx(both)
        assert found[figure] == pytest.approx((20 * both[0] + 10 * both[1]) / 30)
    assert set(alone["test"]) == {"loss", "accuracy"}
    # Private records are of no test split.
    assert set(task.evaluate(model, task.client_records(0, 2))) == {"loss", "accuracy"}


def test_test_splits_of_different_columns_are_refused(make_task: Make, folder: Path) -> None:
    write_split(folder, "test", [{"text": ["so"], "label": 1}])
    with pytest.raises(InvalidValue, match=r"test-split = 'validation,test' .*same columns"):
        make_task(test_split="validation,test").test_records()
    with pytest.raises(InvalidValue, match=r"test-split = ' ,' .*names of splits"):
        make_task(test_split=" ,").test_records()


def test_a_server_does_not_open_the_private_split(make_task: Make, folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    task = make_task(num_classes=2)
    assert set(task.evaluate(task.build_model(), task.test_records())) == {"loss", "accuracy"}
    assert task.head == ("classifier",)
    with pytest.raises(InvalidValue, match="split = 'train'"):
        task.client_records(0, 1)


def test_limits_take_the_same_records_for_every_seed(make_task: Make) -> None:
    limits = {"train_limit": 15, "test_limit": 6, "test_split": "validation,test"}
    first, other = make_task(**limits), make_task(**limits, seed=7)

    private = rows_of(first.client_records(0, 1))
    assert len(set(private)) == 15
    assert private == sorted(private) != list(range(15))
    assert rows_of(other.client_records(0, 1)) == private
    assert rows_of(other.test_records()) == rows_of(first.test_records())
    assert all_of(first.test_records())["part"] == [0] * 6 + [1] * 6
    for limit in (40, 41):
        assert rows_of(make_task(train_limit=limit).client_records(0, 1)) == list(range(40))


def test_a_limit_does_not_change_the_classes(make_task: Make, folder: Path) -> None:
    rows = [{"text": "so " * i, "label": "abc"[i // 19]} for i in range(40)]
    write_split(folder, "train", rows)
    write_split(folder, "validation", [{"text": "so", "label": "c"}])
    task = make_task(train_limit=2)
    assert task.num_classes == 3
    assert all_of(task.test_records())["label"] == [2]


@pytest.mark.parametrize("column", ["", "label"])
def test_clients_share_the_records_by_class(make_task: Make, folder: Path, column: str) -> None:
    rows = [{"text": "so " * i, "gold": "ab"[i % 2], "label": f"x{i % 4}"} for i in range(40)]
    write_split(folder, "train", rows)
    split = {"partitioner": "pathological", "classes_per_client": 1, "num_clients": 2}
    task = make_task(**split, label_column="gold", partition_column=column, input_columns="text")
    parts = [rows_of(task.client_records(client, 2)) for client in range(2)]
    # The label's column by default; a column of that name if it is named.
    step = 4 if column else 2
    assert [{row % step for row in part} for part in parts] == [{0}, {1}]
    if not column:
        assert sorted(parts[0] + parts[1]) == list(range(40))


@pytest.mark.parametrize("client", [-1, 2])
def test_a_client_that_is_not_there_is_refused(make_task: Make, client: int) -> None:
    with pytest.raises(InvalidValue, match=rf"partition-id = {client} .*0 to 1"):
        make_task().client_records(client, 2)


def test_a_task_without_a_model_or_data_is_refused() -> None:
    for key in ("model", "dataset"):
        config = RunConfig.of({"model": "m", "dataset": "d", key: ""})
        with pytest.raises(InvalidValue, match=f"{key} = ''.*'text-classification' needs"):
            TextClassification(config)


def test_names_are_split_at_commas() -> None:
    assert names(" a,b c ,, d,") == ("a", "b c", "d")
    assert names("") == ()


OTHER_PROCESS = """
import json, socket, sys
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from tests.tasks.texts import records_digest, state_digest

def refuse(*place, **options):
    print("the network was asked for", place, file=sys.stderr)
    raise OSError

socket.getaddrinfo = refuse
found = []
for values in json.loads(sys.argv[1]):
    trainer = LocalTrainer.build(RunConfig.of(values))
    task = trainer.task
    # The private records come first here, the public ones in the test.
    private, public = task.client_records(1, 2), task.test_records()
    trainer.engine.verify(private)
    task.evaluate(trainer.adapted.model, public)
    model = state_digest(task.build_model())
    found.append([model, records_digest(public), records_digest(private)])
print(json.dumps(found))
"""


def test_another_process_sees_the_same_prepares_nothing_again_and_is_silent(
    make_task: Make, checkpoint: Checkpoint, tmp_path: Path, empty_cache: Path
) -> None:
    limits = {"train_limit": 15, "test_limit": 6}
    tasks: list[DatasetTask] = [
        make_task(checkpoint(kind), **limits, test_split="validation,test", pooling=pooling)
        for kind, pooling in (("bert", "model"), ("gpt2", "model"), ("albert", "mean"))
    ]
    pictures = write_pictures(tmp_path / "pictures", modes=["P", "L"])
    save_for_hf(build_swin(100), str(model_folder(SMALL_SWIN)), model_args=MODEL_ARGS)
    own = {"model": SMALL_SWIN, "weights": "pretrained", "image_size": 0}
    tasks.append(ImageClassification(image_config(pictures, **own, **limits)))
    expected = [
        [
            state_digest(task.build_model()),
            records_digest(task.test_records()),
            records_digest(task.client_records(1, 2)),
        ]
        for task in tasks
    ]
    kept = {path: path.stat().st_mtime_ns for path in empty_cache.rglob("data.arrow")}
    assert len([path for path in kept if "sources" not in path.parts]) == 2 * len(tasks)
    values = [task._settings.items() for task in tasks]

    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, json.dumps(values)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XDG_CACHE_HOME": str(empty_cache)},
    )

    assert done.stderr == ""
    assert json.loads(done.stdout) == expected
    assert kept == {path: path.stat().st_mtime_ns for path in empty_cache.rglob("data.arrow")}
    assert len({digest for digest, *_ in expected}) == len(tasks)


@pytest.mark.parametrize("partitioner", ["dirichlet", "pathological", "iid"])
def test_a_missing_column_of_the_class_is_not_blamed_on_the_way_of_dealing_out(
    partitioner: str, make_task: Make
) -> None:
    task = make_task(partitioner=partitioner, label_column="verdict")
    with pytest.raises(InvalidValue, match=r"label-column = 'verdict' .*\(read from .*jsonl\)"):
        task.client_records(0, 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_split": "trian"}, "train-split = 'trian' .*did you mean 'train'"),
        ({"test_split": "tset"}, "test-split = 'tset'"),
    ],
)
def test_a_wrong_split_is_named_by_the_key_that_holds_it(
    changes: dict[str, str], told: str, make_task: Make
) -> None:
    with pytest.raises(InvalidValue, match=told):
        make_task(**changes).reading(1)


def test_private_records_that_are_measured_on_are_told_once(make_task: Make, folder: Path) -> None:
    rows = [{"text": f"so {i}", "label": i % 2} for i in range(20)]
    write_split(folder, "train", [*rows, rows[3]])
    write_split(folder, "validation", [{"text": f"other {i}", "label": 0} for i in range(9)])
    write_split(folder, "test", [rows[3], {**rows[5], "label": 0}, {"text": "new", "label": 0}])
    task = make_task(test_split="validation,test")
    lines = [line for split in task.reading(2) for line in split.lines()]
    (told,) = [line for line in lines if "too good" in line]
    assert told.startswith("test: warning: 3 of the 21 records of 'train' are in this split, too")
    (again,) = [line for split in task.reading(2) for line in split.lines() if "too good" in line]
    assert again == told
