"""Shows how clients share a run's records, and whether each can keep the budget's promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.partition import partition_table
from fedlora_flwr.data.records import Records, labels_of
from fedlora_flwr.tasks.registry import Task, build_task, class_names, client_sizes
from fedlora_flwr.terminal import Table

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

# More columns are hard to read, even on several lines.
MAX_COLUMNS = 12
MOST_LISTED = 10_000
"""Clients that the file of a run lists one by one; of more it tells how many records they have."""


def split_counts(config: RunConfig, task: Task | None = None) -> pd.DataFrame:
    """Count the records of each client of a run by class.

    Returns
    -------
    pandas.DataFrame
        As of `fedlora_flwr.data.partition.partition_table`, with the names of the classes where
        the task tells them.

    Raises
    ------
    InvalidValue
        The records cannot be partitioned as configured.
    """
    task = task or build_task(config.task, config)
    found = [
        _labels(task.client_records(client, config.num_clients))
        for client in range(config.num_clients)
    ]
    ends = np.cumsum([len(labels) for labels in found])
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    counts, names = partition_table(np.concatenate(found), parts), class_names(task)
    return counts.rename(columns=dict(enumerate(names))) if names else counts


def split_table(counts: pd.DataFrame, config: RunConfig, values: Sequence[str] = ()) -> Table:
    """Make a split's table for a screen: one row per client, and whether its promise can be kept.

    Up to 12 classes have a column each. With more, one column shows how many a client has.

    Parameters
    ----------
    counts : pandas.DataFrame
        As of `split_counts`.
    config : RunConfig
        The run.
    values : Sequence[str] (default: no column)
        The value of the partition column of each client.
    """
    few = counts.shape[1] <= MAX_COLUMNS
    heads = [str(name) for name in counts.columns] if few else ["classes"]
    named = [config.partition_column] if values else []
    heads, rows = ["client", *named, "records", *heads, "δ < 1/n", "b ≤ n"], []
    for number, (client, row) in enumerate(counts.iterrows()):
        cells = row.tolist() if few else [int((row > 0).sum())]
        words = ["yes" if check else "no" for check in _checks(int(row.sum()), config)]
        own = [values[number]] if values else []
        rows.append([str(client), *own, str(row.sum()), *map(str, cells), *words])
    return Table(heads, rows, ">" + "<" * len(named) + ">" * (len(heads) - 1 - len(named)))


def split_json(
    counts: pd.DataFrame, config: RunConfig, values: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a split in JSON types: every class of every client (arguments as of `split_table`)."""
    names = [str(name) for name in counts.columns]
    clients = []
    for number, (client, row) in enumerate(counts.iterrows()):
        records = int(row.sum())
        delta, batch = _checks(records, config)
        by_class = dict(zip(names, map(int, row.tolist()), strict=True))
        clients.append(
            {
                "client": client, "value": values[number] if values else None,
                "records": records, "by_class": by_class,
                "delta_below_one_over_n": delta, "batch_within_n": batch,
            }
        )  # fmt: skip
    return {"task": config.task, "partitioner": config.partitioner, "clients": clients}


def split_of_run(config: RunConfig) -> dict[str, Any]:
    """Return what a run's folder tells of its split, in JSON types.

    Up to `MOST_LISTED` clients it is `split_json`. With more clients no records are opened, and the
    least, the middle and the largest number of records (or users) of a client stand for all.

    Parameters
    ----------
    config : RunConfig
        The run.

    Raises
    ------
    InvalidValue
        The records cannot be partitioned as configured.
    """
    task = build_task(config.task, config)
    if config.num_clients <= MOST_LISTED:
        return split_json(split_counts(config, task), config)
    sizes = client_sizes(config, task)
    few = {"least": sizes.min(), "median": np.median(sizes), "most": sizes.max()}
    return {
        "task": config.task, "partitioner": config.partitioner, "clients": [],
        "num_clients": config.num_clients, "unit": config.unit,
        "sizes": {name: float(value) for name, value in few.items()},
    }  # fmt: skip


def _checks(records: int, config: RunConfig) -> tuple[bool, bool]:
    """Tell whether a client can keep the promise: δ < 1/n and b ≤ n."""
    return config.delta * records < 1, config.secure_sum or config.batch_size <= records


def _labels(records: Records) -> NDArray[np.int64]:
    found = labels_of(records)
    # Records without a class, e.g. questions, are all counted as class 0.
    return np.zeros(len(records), int) if found is None else found.numpy()
