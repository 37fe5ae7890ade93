"""How many records or users each client has, told without opening the records of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import Records
from fedlora_flwr.data.users import count_units
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.registry import Task, client_sizes
from fedlora_flwr.tasks.table_task import TableClassifier, TableTask
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.backbones.checkpoints import write_split
from tests.tasks.texts import make_checkpoint, reviews, text_config

CLIENTS = 5


def opened(config: RunConfig, task: Task) -> list[int]:
    each = (task.client_records(client, CLIENTS) for client in range(CLIENTS))
    return [count_units(config.unit, records) for records in each]


def of_table(**changes: Any) -> tuple[RunConfig, TableClassifier]:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.normal(size=90), "who": draw.integers(0, 20, 90)})
    frame["label"] = np.where(frame["x"] > 0, "up", "down")
    usual = {"num-clients": CLIENTS, "partitioner": "dirichlet", "seed": 4, "min-records": 1}
    config = RunConfig.of(usual, changes)
    table = TableTask(nn.Linear(1, 2), train=frame, test=frame[:9], columns=["x"])
    return config, table(config)


@pytest.mark.parametrize("unit", ["record", "user"])
@pytest.mark.parametrize("partitioner", ["dirichlet", "iid"])
def test_a_tables_clients_have_as_many_units_as_their_records(unit: str, partitioner: str) -> None:
    column = "who" if unit == "user" else ""
    config, task = of_table(**{"unit": unit, "user-column": column, "partitioner": partitioner})
    assert client_sizes(config, task).tolist() == opened(config, task)


@pytest.mark.parametrize("unit", ["record", "user"])
def test_the_clients_of_files_have_as_many_units_as_their_records(
    tmp_path: Path, unit: str
) -> None:
    rows = [{**row, "who": f"user {i % 11}"} for i, row in enumerate(reviews(60))]
    write_split(tmp_path, "train", rows)
    write_split(tmp_path, "validation", rows[:4])
    config = text_config(
        make_checkpoint("distilbert", tmp_path / "model"), tmp_path, unit=unit, num_clients=CLIENTS,
        user_column="who" if unit == "user" else "",
    )  # fmt: skip
    task = TextClassification(config)
    assert client_sizes(config, task).tolist() == opened(config, task)


def test_users_are_not_counted_where_records_name_none() -> None:
    config, task = of_table(unit="user")
    with pytest.raises(InvalidValue, match="the records of this task name no users"):
        client_sizes(config, task)


def test_a_task_that_opens_other_records_than_its_class_counts_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, task = of_table()

    class Fewer(TableClassifier):
        def client_records(self, partition_id: int, num_partitions: int) -> Records:
            return super().test_records()

    assert client_sizes(config, Fewer(task._table, config)).tolist() == [9] * CLIENTS
    opens = task.client_records
    monkeypatch.setattr(task, "client_records", lambda client, of: opens(0, of))
    assert client_sizes(config, task).tolist() == [len(opens(0, CLIENTS))] * CLIENTS
