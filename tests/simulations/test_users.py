"""Runs whose promise is for users: from a table and from files, and what a device answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fedlora_flwr import RunConfig, TableTask, audit_run, plan_run, simulate
from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import device_config
from fedlora_flwr.data.parts import Parts
from fedlora_flwr.data.users import about_users, count_units
from fedlora_flwr.errors import FedLoRAError, InvalidValue, OrderRefused
from fedlora_flwr.privacy.budget import Segment, calibrate
from fedlora_flwr.privacy.ledger import Account, Ledger
from fedlora_flwr.privacy.spent import spent
from fedlora_flwr.report.facts import RunFacts
from fedlora_flwr.report.promise import promise
from fedlora_flwr.wire.order import Order

CLIENTS, PER_CLIENT = 2, 12
OF_USERS: dict[str, Any] = {
    "strategy": "ffa-lora", "unit": "user", "user_column": "user", "partitioner": "natural-id",
    "partition_column": "site", "num_clients": CLIENTS, "num_rounds": 2, "local_steps": 2,
    "batch_size": 4, "epsilon": 4.0, "delta": 1e-2, "min_records": 1, "max_records_per_user": 3,
    "device": "cpu", "progress": False,
}  # fmt: skip


def table(seed: int = 0) -> pd.DataFrame:
    """Return records of users with 1 to 5 records each, who are all on one site."""
    generator = np.random.default_rng(seed)
    users = np.repeat(
        np.arange(CLIENTS * PER_CLIENT), generator.integers(1, 6, CLIENTS * PER_CLIENT)
    )
    x = generator.normal(size=(len(users), 2))
    return pd.DataFrame(
        {
            "x": x[:, 0], "y": x[:, 1], "label": (x.sum(axis=1) > 0).astype(int),
            "user": [f"user-{number}" for number in users], "site": users % CLIENTS,
        }
    )  # fmt: skip


def task() -> TableTask:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    columns = ("x", "y")
    return TableTask(net, table(), table(1), lora_targets="0", head=("2",), columns=columns)


def test_a_run_counts_users_in_noise_ledger_card_and_report(tmp_path: Path) -> None:
    result = simulate(task=task(), run_dir=str(tmp_path / "run"), **OF_USERS)

    sigma = calibrate(4.0, 1e-2, 4 / PER_CLIENT, steps=4)
    rows = spent(tmp_path / "run" / "ledger.sqlite", delta=1e-2)
    assert {row.unit for row in rows} == {"user"}
    assert {(row.noise_multiplier, row.sample_rate) for row in rows} == {(sigma, 4 / PER_CLIENT)}
    assert result.summary["epsilon_max"] <= 4
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "all training records of one user of one client together" in card
    assert "one training record" not in card


def test_a_round_that_is_asked_again_has_the_same_users_records_and_bits(tmp_path: Path) -> None:
    given = {key: value for key, value in OF_USERS.items() if key != "progress"}
    config = RunConfig(**{**given, "reproducible": True})
    ledger, order, answers = Ledger(tmp_path / "ledger.sqlite"), Order(1, "B"), []

    # Each time a new process, as after a kill: another trainer, and the ledger on the disk.
    for run, continues in (("run-1", ""), ("run-2", "run-1")):
        trainer = LocalTrainer.build(config, task()(config))
        records = trainer.task.client_records(0, CLIENTS)
        client = LocalRound(trainer, records, ledger, "site-0", run)
        answers.append(client.run(replace(order, continues=continues), trainer.start))

    first, again = answers
    assert first.ledger == again.ledger
    assert first.ledger.steps == config.local_steps
    for name, array in first.arrays.items():
        assert np.array_equal(array, again.arrays[name])


def test_a_secure_sum_counts_users(tmp_path: Path) -> None:
    changes = {
        "trust_model": "secure-sum", "sample_rate": 0.5, "local_steps": 1, "delta": 1e-3,
        "dropouts": 0, "colluding": 0,
    }  # fmt: skip
    result = simulate(task=task(), run_dir=str(tmp_path / "run"), **{**OF_USERS, **changes})

    assert result.summary["status"] == "completed"
    rows = spent(tmp_path / "run" / "ledger.sqlite", delta=1e-3)
    assert {(row.unit, row.sample_rate) for row in rows} == {("user", 0.5)}
    # δ is for the users of all clients together: 1/24, not one over the number of records.
    with pytest.raises(InvalidValue, match="24 users of all clients together"):
        simulate(task=task(), **{**OF_USERS, **changes, "delta": 0.045})


def test_a_column_that_cannot_name_users_is_refused_before_the_run() -> None:
    for column, reason in (("usr", "usr"), ("x", "a column of text or of whole numbers")):
        with pytest.raises(InvalidValue, match=reason):
            simulate(task=task(), **{**OF_USERS, "user_column": column})
    with pytest.raises(InvalidValue, match="the records of this task name no users"):
        simulate("digits", unit="user", num_rounds=1, progress=False)
    with pytest.raises(InvalidValue, match="where unit = 'record'"):
        RunConfig(user_column="user")
    with pytest.raises(InvalidValue, match="train-limit = 10"):
        RunConfig(unit="user", user_column="user", train_limit=10)


def test_a_report_names_the_unit() -> None:
    told = promise(RunFacts("run", RunConfig(unit="user"), rounds=[], clients=[], summary={}))

    assert "The promise is for all training records of one user of one client together" in told
    assert "the user's gradient is zero in every step" in told
    assert "how many users there are" in told


def test_users_on_several_clients_are_named() -> None:
    users = np.array([0, 0, 1, 1])
    apart = about_users(users, Parts.of([np.array([0, 1]), np.array([2, 3])]))
    mixed = about_users(users, Parts.of([np.array([0, 2]), np.array([1, 3])]))

    assert len(apart) == 1
    assert "2 of them have records on several clients" in mixed[1]


MINE = {
    "task": "digits", "epsilon": 1.0, "delta": 1e-5, "unit": "user", "user-column": "patient",
}  # fmt: skip


def test_a_server_cannot_weaken_the_unit_of_a_device() -> None:
    # The server says that each record is a unit: refused, before a record is opened.
    with pytest.raises(OrderRefused, match="this device's file has another value of unit"):
        device_config({"unit": "record"}, MINE)
    # It says nothing, or names another column: the device's own file decides.
    for run in ({}, {"user-column": "row-id"}, {"user-column": "", "unit": "user"}):
        found = device_config(run, MINE)
        assert (found.unit, found.user_column) == ("user", "patient")
    # It claims users towards its own readers, and the device protects records: refused as well.
    with pytest.raises(OrderRefused, match="another value of unit"):
        device_config({"unit": "user"}, {"task": "digits", "epsilon": 1.0, "delta": 1e-5})
    # It may ask for any number of records of a user: the mean is clipped to C all the same.
    assert device_config({"max-records-per-user": 1_000_000}, MINE).max_records_per_user == 10**6


def test_releases_for_records_and_for_users_never_add_up(tmp_path: Path) -> None:
    ledger, step = Ledger(tmp_path / "ledger.sqlite"), Segment(2.0, 0.1, 1)
    account = Account("ward-3", "run-1", 8.0, 1e-3, "lifetime")
    ledger.record(account, 1, step, step)

    for run in ("run-1", "run-2"):
        other = Account("ward-3", run, 8.0, 1e-3, "lifetime", unit="user")
        with pytest.raises(InvalidValue, match="the unit of this data's earlier releases"):
            ledger.record(other, 2, step, step)
    # A budget per run covers one run alone, and the ledger shows no ε of both runs together.
    ledger.record(Account("ward-3", "run-3", 8.0, 1e-3, "run", unit="user"), 1, step, step)
    assert [(row.run, row.unit) for row in spent(tmp_path / "ledger.sqlite", 1e-3)] == [
        ("run-1", "record"), ("run-3", "user")
    ]  # fmt: skip


def test_a_forecast_counts_users() -> None:
    given = {key: value for key, value in OF_USERS.items() if key != "progress"}
    found = plan_run(task=task(), **given).as_json()

    assert found["unit"] == "user"
    assert [client["users"] for client in found["clients"]] == [PER_CLIENT] * CLIENTS
    assert json.dumps(found)


def test_an_audit_measures_no_users() -> None:
    with pytest.raises(FedLoRAError, match="the canaries of an audit are records"):
        audit_run(RunConfig(task="digits", unit="user"))


def test_clients_of_a_table_have_their_users() -> None:
    config = RunConfig(
        unit="user", user_column="user", partitioner="natural-id", partition_column="site",
        num_clients=2, min_records=1,
    )  # fmt: skip
    made = task()(config)

    sizes = [count_units("user", made.client_records(client, 2)) for client in range(2)]

    assert sizes == [PER_CLIENT] * 2
