from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.forecast_screen import show_forecast
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.forecast import split_table as module
from fedlora_flwr.forecast.plan_run import plan_budgets
from fedlora_flwr.forecast.split_table import split_counts, split_of_run, split_table
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.sections import sections_of
from fedlora_flwr.tasks.registry import build_task
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config


def cells(counts: pd.DataFrame, config: RunConfig) -> list[list[str]]:
    table = split_table(counts, config)
    return [list(row) for row in (table.heads, *table.rows)]


def test_counts_are_those_of_the_clients_records() -> None:
    config = RunConfig.of({"num-clients": 4, "seed": 5})
    task = build_task("digits", config)
    counts = split_counts(config)
    for client in range(4):
        records = task.client_records(client, 4)
        labels = records.batch(torch.arange(len(records)))["label"].numpy()
        assert counts.to_numpy()[client].tolist() == np.bincount(labels, minlength=10).tolist()


def test_the_table_says_whether_a_budget_can_be_kept() -> None:
    counts = pd.DataFrame([[50, 50], [60, 39], [3, 28]])
    config = RunConfig.of({"delta": 0.01, "batch-size": 32})
    assert cells(counts, config) == [
        ["client", "records", "0", "1", "δ < 1/n", "b ≤ n"],
        ["0", "100", "50", "50", "no", "yes"],
        ["1", "99", "60", "39", "yes", "yes"],
        ["2", "31", "3", "28", "yes", "no"],
    ]
    edge = pd.DataFrame([[32]])
    assert cells(edge, config)[1][-1] == "yes"


@pytest.mark.parametrize(("classes", "head"), [(12, "11"), (13, "classes")])
def test_of_many_classes_only_the_number_is_shown(classes: int, head: str) -> None:
    frame = pd.DataFrame([[1] * (classes - 1) + [0]])
    rows = cells(frame, RunConfig())
    assert rows[0][-3] == head
    assert rows[1][-3] == ("0" if head == "11" else "12")


def test_clients_of_a_column_are_named_by_its_values_in_both_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sites = ["north"] * 12 + ["east"] * 30 + ["south"] * 20
    rows = [{**row, "site": site} for row, site in zip(reviews(62), sites, strict=True)]
    for split in ("train", "validation"):
        write_split(tmp_path / "set", split, rows)
    config = text_config(
        make_checkpoint("bert", tmp_path / "model"), tmp_path / "set", num_classes=2,
        input_columns="text", partitioner="natural-id", partition_column="site", num_clients=3,
        batch_size=4, delta=1e-3,
    )  # fmt: skip
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config.to_toml())
    expected = [("east", 30), ("north", 12), ("south", 20)]
    path = str(tmp_path / "split.png")
    shown = CliRunner().invoke(app, ["inspect-split", str(recipe), "--output", path]).output
    lines = [line.split()[:3] for line in shown.splitlines()[:4]]
    told = [[str(client), site, str(n)] for client, (site, n) in enumerate(expected)]
    assert lines == [["client", "site", "records"], *told]
    as_json = ["inspect-split", str(recipe), "--output", path, "--json"]
    found = json.loads(CliRunner().invoke(app, as_json).stdout)["clients"]
    assert [(one["value"], one["records"]) for one in found] == expected
    forecast = plan_budgets(config, [8.0])[0]
    assert [(one.value, one.records) for one in forecast.clients] == expected
    buffer = StringIO()
    show_forecast(forecast, Console(file=buffer))
    lines = [line.split()[:3] for line in buffer.getvalue().splitlines()[:4]]
    assert lines == [["client", "site", "records"], *told]


@pytest.mark.parametrize("stated", [{}, {"class_names": "good,bad"}])
def test_classes_are_shown_by_name(stated: dict[str, str], tmp_path: Path) -> None:
    rows = [{"text": f"so {n}", "opinion": ("bad", "good")[n % 3 == 0]} for n in range(30)]
    for split in ("train", "validation"):
        write_split(tmp_path / "set", split, rows)
    config = text_config("no-model", tmp_path / "set", label_column="opinion", **stated)
    task: Any = TextClassification(config)
    # What is counted needs no tokens, which a model's tokenizer would make.
    task.client_records = lambda client, clients: TensorRecords(
        {"label": torch.from_numpy(task._labels.numbers(task._train))}
    )
    counts = split_counts(replace(config, num_clients=1), task)
    assert counts.loc[0].to_dict() == {"bad": 20, "good": 10}
    order = ["good", "bad"] if stated else ["bad", "good"]
    assert cells(counts, config)[0] == ["client", "records", *order, "δ < 1/n", "b ≤ n"]


def test_the_command_prints_the_table_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "split.png"
    command = ["inspect-split", "digits", "--output", str(path), "-c", "num-clients=3"]
    result = CliRunner().invoke(app, [*command, "-c", "partitioner=shard"])
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert rows[0][:12] == ["client", "records", *map(str, range(10))]
    assert [row[:2] for row in rows[1:4]] == [["0", "478"], ["1", "478"], ["2", "478"]]
    assert str(path) in result.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "recipe = 'digit'"),
        (["-c", "partitioner=dirichlett"], "did you mean 'dirichlet'"),
        (["-c", "partitioner=natural-id"], "partition-column = ''"),
        (["-c", "min-records=200"], "min-records = 200"),
        (["-c", "partition-sizes=a"], "partition-sizes = 'a'"),
        (["--output", "split.svg"], "--output"),
        (["--output", "no/such/folder/split.png"], "--output"),
    ],
)
def test_bad_input_is_one_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["inspect-split", *arguments])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert message in result.output
    assert not list(tmp_path.glob("*.png"))


def test_records_without_labels_are_counted_as_one_class() -> None:
    assert module._labels(TensorRecords({"image": torch.zeros(3, 1)})).tolist() == [0, 0, 0]


@pytest.mark.parametrize("listed", [3, 4])
def test_of_very_many_clients_three_sizes_are_told(
    listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LISTED", listed)
    config = RunConfig.of({"num-clients": 4, "seed": 5})
    told = json.loads(json.dumps(split_of_run(config)))
    sizes = sorted(split_counts(config).sum(axis=1).tolist())
    if listed == 4:
        assert sorted(client["records"] for client in told["clients"]) == sizes
        return
    assert (told["clients"], told["num_clients"], told["unit"]) == ([], 4, "record")
    middle = (sizes[1] + sizes[2]) / 2
    assert told["sizes"] == {"least": sizes[0], "median": middle, "most": sizes[3]}
    facts = RunFacts("run", config, summary={}, rounds=[], split=told)
    (section,) = [found for found in sections_of(facts) if found.anchor == "split"]
    assert f"A client has {sizes[0]} to {sizes[3]} records" in str(section)
