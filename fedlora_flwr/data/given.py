"""Records that a caller in Python gives as objects: pandas tables and data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedlora_flwr.errors import InvalidValue, one_line, unknown

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

Table: TypeAlias = "pd.DataFrame | Dataset"
"""A pandas DataFrame, or a data set of the library `datasets`."""


def given_split(splits: Mapping[str, Any], split: str) -> Dataset:
    """Return a split of the tables that were given.

    Parameters
    ----------
    splits : Mapping[str, DataFrame or Dataset]
        Tables by the name of their split.
    split : str
        Name of the split.

    Raises
    ------
    InvalidValue
        There is no such split, or its table cannot be read.
    """
    if split not in splits:
        raise unknown("split", split, splits)
    return as_dataset(splits[split], split)


def as_dataset(table: Any, name: str) -> Dataset:
    """Return a table as a data set with a fingerprint of its content.

    Parameters
    ----------
    table : DataFrame or Dataset
        The table. The index of a DataFrame is left out.
    name : str
        How the table is called, for errors.

    Raises
    ------
    InvalidValue
        It is not a table, or a column holds values of several types.
    """
    import datasets
    import pyarrow as pa

    if isinstance(table, datasets.Dataset):
        return table
    if not is_table(table):
        raise _no_table(table, name)
    plain = table.astype({c: object for c, t in table.dtypes.items() if str(t) == "category"})
    try:
        content = pa.Table.from_pandas(plain, preserve_index=False).replace_schema_metadata()
    except (pa.ArrowException, TypeError, ValueError) as error:
        allowed = f"a table with one type per column ({one_line(error)})"
        raise InvalidValue(name, "DataFrame", allowed) from error
    return datasets.Dataset(datasets.table.InMemoryTable(content), fingerprint=_digest(content))


def as_frame(table: Any, name: str) -> pd.DataFrame:
    """Return a table as a DataFrame.

    Parameters and errors are those of `as_dataset`.
    """
    if not is_table(table):
        raise _no_table(table, name)
    frame: pd.DataFrame = table.to_pandas() if hasattr(table, "to_pandas") else table
    return frame


def is_table(thing: object) -> bool:
    """Tell whether an object is a table, without an import of the libraries that make tables."""
    names = {f"{k.__module__.partition('.')[0]}.{k.__name__}" for k in type(thing).__mro__}
    return not names.isdisjoint({"pandas.DataFrame", "datasets.Dataset"})


def is_path(thing: object) -> bool:
    """Tell whether records are named and not given."""
    return isinstance(thing, str | Path)


def _no_table(thing: object, name: str) -> InvalidValue:
    return InvalidValue(name, type(thing).__name__, "a pandas DataFrame or a datasets.Dataset")


def _digest(content: Any) -> str:
    found = hashlib.sha256(str(content.schema).encode())
    for batch in content.to_batches():
        found.update(batch.serialize())
    return found.hexdigest()[:32]
