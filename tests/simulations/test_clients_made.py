"""The number of clients where the partitioner makes them: counted, said, and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedlora_flwr import RunConfig, TableTask, audit_run, compare, plan_run, simulate
from fedlora_flwr.cli import app
from fedlora_flwr.config.settled import CLIENTS
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.plan_run import plan_budgets
from fedlora_flwr.studies.comparison import Comparison
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.registry import build_task, with_clients
from tests.simulations.tables import table as rows

SITES = ["east"] * 60 + ["north"] * 40 + ["south"] * 60
BY_SITE: dict[str, Any] = {"partitioner": "natural-id", "partition_column": "site"}
SHORT: dict[str, Any] = {
    "strategy": "ffa-lora", "num_rounds": 1, "local_steps": 1, "batch_size": 8, "delta": 1e-3,
    "min_records": 1, "device": "cpu",
}  # fmt: skip
MADE = [
    (BY_SITE, 3, "one for each value of 'site'"),
    ({"partitioner": "size", "partition_sizes": "30,50"}, 2, "one for each number"),
    (
        {"partitioner": "label-shares", "label_shares": "1,0; 0,1; 0.5,0.5; 0.5,0.5"},
        4,
        "one for each row of label-shares",
    ),
]


class Silent(DigitsTask):
    """A task that does not tell the values of which its clients are made."""

    client_values = None  # type: ignore[assignment]


def table() -> pd.DataFrame:
    return rows(len(SITES)).assign(site=SITES)


@pytest.fixture
def task() -> TableTask:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return TableTask(net, table(), rows(80), lora_targets="0", head=("2",), columns=list("abcd"))


@pytest.mark.parametrize(("split", "clients", "words"), MADE)
def test_a_number_that_nobody_gave_is_taken_from_the_split_and_said(
    task: TableTask, tmp_path: Path, split: dict[str, Any], clients: int, words: str
) -> None:
    planned = plan_run(task=task, **SHORT, **split)
    assert len(planned.clients) == planned.config.num_clients == clients
    assert planned.config.clients_are.startswith(words)

    result = simulate(task=task, run_dir=str(tmp_path / "run"), progress=False, **SHORT, **split)
    assert result.summary["num_clients"] == clients
    assert result.summary["remarks"]["clients"].startswith(words)
    assert result.config.num_clients == clients


@pytest.mark.parametrize(("split", "clients", "words"), MADE)
def test_a_number_that_does_not_fit_is_refused_before_any_work(
    task: TableTask, tmp_path: Path, split: dict[str, Any], clients: int, words: str
) -> None:
    assert words
    given = {**SHORT, **split, "num_clients": 7}
    for ask in (
        lambda: plan_run(task=task, **given),
        lambda: simulate(task=task, run_dir=str(tmp_path / "run"), progress=False, **given),
        lambda: compare(
            "digits", ["ffa-lora"], task=task, output=tmp_path / "compared", seeds=1, trials=0,
            epsilons=[8], progress=False,
            **{key: value for key, value in given.items() if key != "strategy"},
        ),
    ):  # fmt: skip
        with pytest.raises(InvalidValue, match=f"expected {clients}, as .* Set 0 to take") as found:
            ask()
        assert (found.value.key, found.value.value) == ("num-clients", 7)
    assert not (tmp_path / "run").exists()


def test_a_number_that_fits_is_taken(task: TableTask) -> None:
    assert plan_run(task=task, **SHORT, **BY_SITE, num_clients=3).config.num_clients == 3


def test_where_the_split_leaves_the_number_open_there_are_ten() -> None:
    config = RunConfig()
    assert with_clients(config, build_task("digits", config)).num_clients == CLIENTS == 10


def test_a_comparison_and_an_audit_take_all_clients_of_the_column(
    task: TableTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {key: value for key, value in {**SHORT, **BY_SITE}.items() if key != "strategy"}
    checked: list[RunConfig] = []
    monkeypatch.setattr(Comparison, "check", lambda self, _: checked.append(self.config))
    compare(
        "digits", ["ffa-lora"], task=task, output=tmp_path / "compared", seeds=1, trials=0,
        epsilons=[8], baselines="none", progress=False, **shared,
    )  # fmt: skip
    settings = json.loads((tmp_path / "compared" / "settings.json").read_text())
    assert settings["num-clients"] == 3
    assert [config.num_clients for config in checked] == [3]
    by_class: dict[str, Any] = {"partitioner": "natural-id", "partition_column": "label"}
    once: dict[str, Any] = {"mode": "one-run", "records": 10, "confidence": 0.9999}
    record = audit_run("digits", num_clients=0, num_rounds=1, **once, **by_class)
    assert record.settings["num-clients"] == 10
    assert record.counts.present + record.counts.absent == 100


def test_without_the_data_nobody_can_count_clients(task: TableTask) -> None:
    assert task
    config = RunConfig(partitioner="natural-id", partition_column="label")
    with pytest.raises(InvalidValue, match=r"num-clients = 0 .* opens no data"):
        plan_run(config, records=100)
    with pytest.raises(InvalidValue, match=r"num-clients = 0 .* opens no data"):
        plan_budgets(config, [8.0], records=100)
    sized = plan_run(config, records=100, partitioner="size", partition_sizes="100,100")
    assert sized.config.num_clients == 2


def test_a_column_that_is_not_there_is_refused(task: TableTask) -> None:
    with pytest.raises(InvalidValue, match="partition-column = 'sit' cannot be used"):
        plan_run(task=task, **SHORT, partitioner="natural-id", partition_column="sit")


def test_a_task_that_does_not_tell_its_clients_needs_the_number() -> None:
    config = RunConfig(task="tests.simulations.test_clients_made:Silent", **BY_SITE)
    with pytest.raises(InvalidValue, match="does not tell how many clients"):
        with_clients(config, build_task(config.task, config))
    assert with_clients(replace(config, num_clients=2), Silent(config)).num_clients == 2


def test_commands_count_the_clients_of_a_column(tmp_path: Path) -> None:
    by_class = ("-c", "partitioner=natural-id", "-c", "partition-column=label")
    cut = CliRunner().invoke(
        app, ["inspect-split", "digits", *by_class, "--output", str(tmp_path / "split.png")]
    )
    assert [line.split()[1] for line in cut.stdout.splitlines()[1:11]] == list("0123456789")
    said = CliRunner().invoke(app, ["plan", "digits", *by_class, "--epsilon", "8"])
    assert said.exit_code == 0, said.output
    short = ("-c", "num-rounds=1", "-c", "local-steps=1", "-c", "epsilon=inf", "--output")
    done = CliRunner().invoke(app, ["simulate", "digits", *by_class, *short, str(tmp_path)])
    assert done.exit_code == 0, done.output
    start, end = done.output.split("round 0/1")
    assert "Clients   10 with " in start
    assert "(natural-id: one for each value of 'label')" in start
    assert "Clients   one for each value of 'label'" in end
    wrong = CliRunner().invoke(app, ["plan", "digits", *by_class, "-c", "num-clients=4"])
    assert "num-clients = 4 cannot be used: expected 10, as partition-column" in wrong.output
