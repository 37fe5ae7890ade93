"""`simulate` and `RunResult`: the command's run, from Python, with names and with objects."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from fedlora_flwr import RoLoRA, RunConfig, RunResult, TableTask, evaluate, load_runs, simulate
from fedlora_flwr.cli import app
from fedlora_flwr.config.recipes import config_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.registry import build_task
from tests.simulations.tables import table
from tests.tasks.texts import make_checkpoint, reviews

SMALL: dict[str, Any] = {
    "num_clients": 2, "num_rounds": 2, "local_steps": 2, "partitioner": "iid", "device": "cpu",
    "reproducible": True,
}  # fmt: skip


class Mine(RoLoRA):
    """A strategy that can be imported by its name."""


def made() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def task_of(**changes: Any) -> TableTask:
    given = {"train": table(), "test": table(60), "lora_targets": "0", "head": ("2",), **changes}
    return TableTask(made(), **given)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def named(runs: Path) -> RunResult:
    return simulate("digits", **SMALL, seed=7, output=runs)


@pytest.fixture(scope="module")
def own(runs: Path) -> RunResult:
    return simulate(task=task_of(), strategy=RoLoRA, **SMALL, delta=1e-3, output=runs)


def test_a_result_is_what_the_commands_folder_holds(named: RunResult, tmp_path: Path) -> None:
    keys = {key.replace("_", "-"): str(value).lower() for key, value in SMALL.items()}
    settings = [part for key, value in keys.items() for part in ("-c", f"{key}={value}")]
    command = ["simulate", "digits", "--json", "--output", str(tmp_path), *settings, "-c", "seed=7"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    said = RunResult.load(tmp_path / "latest")
    assert said.as_json() == json.loads(done.stdout)
    same = ["accuracy", "loss", "epsilon_max", "plan", "agreement.B"]
    pd.testing.assert_frame_equal(said.rounds[same], named.rounds[same])
    assert set(named.clients["round"]) == {1, 2}
    name = "adapter_model.safetensors"
    first, second = (load_file(run.adapter / name) for run in (said, named))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert said.config == named.config


def test_the_model_is_the_runs_last(named: RunResult, own: RunResult) -> None:
    for result in (named, own):
        found = evaluate(result)
        assert found.metrics["accuracy"] == result.summary["final_accuracy"]
    assert named.best is not None
    assert named.model(best=True).peft_config["default"].r == named.config.rank


def test_a_plot_is_a_figure_and_a_file(named: RunResult, tmp_path: Path) -> None:
    assert isinstance(named.plot(tmp_path / "rounds.png"), Figure)
    assert (tmp_path / "rounds.png").stat().st_size > 10_000


def test_runs_are_one_table_with_the_keys_that_differ(
    named: RunResult, own: RunResult, runs: Path
) -> None:
    found = load_runs(runs).set_index("run")
    assert set(found.index) == {named.path.name, own.path.name}
    assert found.loc[named.path.name, "final_accuracy"] == named.summary["final_accuracy"]
    assert found.loc[named.path.name, "run.seed"] == 7
    assert {"task.task", "run.seed"} <= {*found.columns}
    assert {"lora.rank", "federation.num-rounds"}.isdisjoint(found.columns)
    with pytest.raises(InvalidValue, match="a folder with the folders of runs"):
        load_runs(runs / "none")


def test_a_module_and_a_table_train_and_stay_as_they_are(own: RunResult) -> None:
    assert own.summary["status"] == "completed"
    assert own.rounds["plan"].tolist()[1:] == ["B", "A"]
    given = own.task.model
    assert all(
        torch.equal(a, b) for a, b in zip(given.parameters(), made().parameters(), strict=True)
    )
    base = own.model().get_base_model()
    frozen = dict(base.named_parameters())["0.base_layer.weight"]
    assert torch.equal(frozen, given[0].weight)


def test_a_run_of_an_object_is_read_with_the_object(own: RunResult) -> None:
    later = RunResult.load(own.path)
    with pytest.raises(InvalidValue, match="give it again as task"):
        later.model()
    found = evaluate(RunResult.load(own.path, task=own.task), table(40))
    assert found.records == 40
    with pytest.raises(InvalidValue, match="Give the object again"):
        build_task(later.config.task, later.config)


def test_records_as_tables_are_those_of_the_same_files(tmp_path: Path) -> None:
    train, test = pd.DataFrame(reviews(60)), pd.DataFrame(reviews(20, seed=1))
    (tmp_path / "films").mkdir()
    train.to_csv(tmp_path / "films" / "train.csv", index=False)
    test.to_csv(tmp_path / "films" / "validation.csv", index=False)
    shared = {
        **SMALL, "task": "text-classification", "delta": 1e-3, "batch_size": 8, "min_records": 1,
        "model": make_checkpoint("bert", tmp_path / "base"), "num_rounds": 1, "output": tmp_path,
        "input_columns": "text", "max_length": 32,
    }  # fmt: skip
    given = simulate(RunConfig(), train=train, test=test, **shared)
    filed = simulate(RunConfig(), dataset=tmp_path / "films", **shared)
    assert given.rounds["loss"].tolist() == filed.rounds["loss"].tolist()
    assert given.summary["epsilon_max"] == filed.summary["epsilon_max"]


def test_a_class_that_can_be_imported_keeps_its_place(tmp_path: Path) -> None:
    result = simulate("digits", strategy=Mine, **{**SMALL, "num_rounds": 1}, output=tmp_path)
    assert result.config.strategy == f"{__name__}:Mine"

    class Inner(RoLoRA):
        """One that cannot."""

    again = simulate("digits", strategy=Inner, **{**SMALL, "num_rounds": 1}, output=tmp_path)
    assert again.summary["strategy"].startswith("this-process:Inner_")
    assert again.rounds["loss"].tolist() == result.rounds["loss"].tolist()


class Task:
    """A task that is an object, with the members of the protocol alone."""

    name, metric, lora_targets, head = "own", "accuracy", "0", ("2",)

    def __init__(self) -> None:
        self.inner = task_of()(RunConfig(partitioner="iid"))

    def build_model(self) -> nn.Module:
        return self.inner.build_model()

    def client_records(self, partition_id: int, num_partitions: int) -> Any:
        return self.inner.client_records(partition_id, num_partitions)

    def test_records(self) -> Any:
        return self.inner.test_records()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self.inner.losses(model, batch)

    def evaluate(self, model: nn.Module, records: Any) -> dict[str, float]:
        return self.inner.evaluate(model, records)


def test_a_task_is_an_object_or_what_makes_one(tmp_path: Path, own: RunResult) -> None:
    found = simulate(task=Task(), **SMALL, delta=1e-3, output=tmp_path)
    assert found.rounds["loss"].tolist() == own.rounds["loss"].tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Give a folder in which nothing may be made."""
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": task_of(), "workers": 2}, "workers = 2 cannot be used: expected this process"),
        (
            {"task": task_of(), "engine": "flower"},
            "engine = 'flower' cannot be used: expected this",
        ),
        ({"train": table(), "test": table(), "workers": 2}, "dataset was given as an object"),
        ({"strategy": RoLoRA()}, "strategy = 'RoLoRA' cannot be used: expected a name, or a sub"),
        ({"strategy": dict}, "strategy = 'dict' cannot be used"),
        ({"train": table()}, "test = None cannot be used"),
        ({"train": [1], "test": table()}, "train = 'list' cannot be used: expected a pandas"),
        ({"engine": "ray"}, "engine = 'ray' cannot be used: expected one of ['process', 'flower']"),
        ({"resume": "nowhere"}, "recipe = 'digits' cannot be used: expected no recipe"),
        ({"num_round": 3}, "did you mean 'num-rounds'"),
        ({"epsilon": "many"}, "epsilon = 'many' cannot be used"),
        ({"task": 5}, "cannot be used: expected module:function, where calling it returns a task"),
        ({"task": task_of(label="class")}, "label = 'class' cannot be used: expected"),
        ({"task": task_of(columns=["z"])}, "columns = 'z' cannot be used: expected"),
        ({"task": task_of(classes=["up"])}, "table 'train' also holds ['down']"),
        ({"task": task_of(inputs=lambda frame: 3)}, "inputs = 'a int' cannot be used"),
        ({"task": task_of(train=table().assign(a="x"))}, "columns of numbers in table 'train'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue) as told:
        simulate("digits", **{**SMALL, **changes}, output=folder)
    assert said in str(told.value)


def test_a_run_that_fails_names_its_folder(tmp_path: Path) -> None:
    logger = logging.getLogger("flwr")
    before = list(logger.handlers)
    broken = Task()
    counted = iter(range(9))

    def failing(model: nn.Module, records: Any) -> dict[str, float]:
        if next(counted) == 1:
            raise RuntimeError("no figures today")
        return {"loss": 0.0, "accuracy": 0.0}

    broken.evaluate = failing  # type: ignore[method-assign]
    with pytest.raises(Exception, match="no figures today") as told:
        simulate(task=broken, **SMALL, delta=1e-3, output=tmp_path)
    (run,) = (path for path in tmp_path.iterdir() if not path.is_symlink())
    assert told.value.__notes__ == [f"The run's folder is {run}; its log is run.log."]
    assert RunResult.load(run).summary["status"] == "failed"
    assert logger.handlers == before


def test_a_run_continues_with_its_object(own: RunResult, tmp_path: Path) -> None:
    free = {**SMALL, "epsilon": math.inf, "output": tmp_path}
    whole = simulate(task=own.task, **free)
    first = simulate(task=own.task, **{**free, "num_rounds": 1})
    more = simulate(resume=first.path, task=own.task, num_rounds=2)
    assert more.path == first.path
    assert more.rounds["round"].tolist() == [0, 1, 2]
    assert more.rounds["loss"].tolist() == whole.rounds["loss"].tolist()


def test_keys_are_written_in_any_way_and_paths_are_paths(tmp_path: Path) -> None:
    found = config_of("digits", {"lr_a": 0.5, "privacy.epsilon": 3, "state_dir": tmp_path})
    assert (found.lr_a, found.epsilon, found.state_dir) == (0.5, 3.0, str(tmp_path))
    assert config_of(found, {}) is found
    assert config_of(found, {"rank": 2}).lr_a == 0.5
