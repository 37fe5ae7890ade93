"""How a run's records are spread over its clients, and what its budget makes of each client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlora_flwr.config import RunConfig
from fedlora_flwr.tasks.partition import partition_table
from fedlora_flwr.tasks.registry import Records, build_task, reading

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from rich.table import Table

# More columns do not fit on a screen.
MAX_COLUMNS = 12
_READ_AT_ONCE = 1024


def split_counts(config: RunConfig) -> pd.DataFrame:
    """Count the records of each client of a run by class.

    Returns
    -------
    pandas.DataFrame
        As of `fedlora_flwr.tasks.partition.partition_table`.

    Raises
    ------
    InvalidValue
        The records cannot be spread as the configuration asks.
    """
    task = build_task(config.task, config)
    found = [
        _labels(task.client_records(client, config.num_clients))
        for client in range(config.num_clients)
    ]
    ends = np.cumsum([len(labels) for labels in found])
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    return partition_table(np.concatenate(found), parts)


def records_read(config: RunConfig) -> list[str]:
    """Return sentences on the records that a run reads and leaves out."""
    return reading(build_task(config.task, config), config.num_clients)


def split_table(counts: pd.DataFrame, config: RunConfig) -> Table:
    """Make the table of a split for a screen: a row a client, and whether its budget can be kept.

    Up to 12 classes have a column each; of more, the number that a client has is shown.
    """
    from rich.table import Table

    few = counts.shape[1] <= MAX_COLUMNS
    table = Table(box=None, pad_edge=False)
    heads = [str(name) for name in counts.columns] if few else ["classes"]
    for head in ("client", "records", *heads, "δ < 1/n", "b ≤ n"):
        table.add_column(head, justify="right")
    for client, row in counts.iterrows():
        records = int(row.sum())
        cells = row.tolist() if few else [int((row > 0).sum())]
        checks = (config.delta * records < 1, config.batch_size <= records)
        words = ["yes" if check else "no" for check in checks]
        table.add_row(str(client), str(records), *map(str, cells), *words)
    return table


def _labels(records: Records) -> NDArray[np.int64]:
    import torch

    found = []
    for start in range(0, len(records), _READ_AT_ONCE):
        end = min(start + _READ_AT_ONCE, len(records))
        batch = records.batch(torch.arange(start, end))
        # Records without a class, e.g. questions, are counted as they are.
        found.append(batch["label"].numpy() if "label" in batch else np.zeros(end - start, int))
    return np.concatenate(found)
