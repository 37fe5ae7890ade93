"""Parquet files as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.data.csv_files import require_different
from fedlora_flwr.data.plain_text import reason, unreadable
from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    import pyarrow as pa

# Records per table. Pictures may be large, so few are read at once.
_ROWS = 256


def parquet_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the records of parquet files, up to 256 per table.

    Dictionary-encoded columns (the categories of pandas) become columns of plain values.

    Parameters
    ----------
    paths : Sequence[Path]
        At least one file; all have the columns of the first.

    Raises
    ------
    InvalidValue
        A file is damaged, has other columns than the first, or has two columns of one name.
    """
    from datasets.table import table_cast

    schema = None
    for path in paths:
        try:
            for table in _tables(path):
                require_different(path, table.column_names)
                if schema is None:
                    schema = _plain(table.schema)
                _require_columns(path, table, schema)
                yield table_cast(table.select(schema.names), schema)
        except InvalidValue:
            raise
        except Exception as error:
            # The library raises errors of many types on damaged bytes.
            expected = f"a parquet file that can be read ({reason(error)}). Copy or write it again"
            raise unreadable(path, expected) from error


def _tables(path: Path) -> Iterator[pa.Table]:
    import pyarrow as pa
    from pyarrow import parquet

    if path.stat().st_size == 0:
        return
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            if batch.num_rows:
                yield pa.Table.from_batches([batch])


def _plain(schema: pa.Schema) -> pa.Schema:
    """Return the schema without encodings, with the data set features stored in the file."""
    import datasets
    import pyarrow as pa

    for place, field in enumerate(schema):
        if pa.types.is_dictionary(field.type):
            schema = schema.set(place, field.with_type(field.type.value_type))
        elif pa.types.is_string_view(field.type):
            schema = schema.set(place, field.with_type(pa.string()))
    return datasets.Features.from_arrow_schema(schema).arrow_schema


def _require_columns(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    if set(table.column_names) != set(schema.names):
        expected = f"the columns {schema.names} of the first file, but it has {table.column_names}"
        raise unreadable(path, expected)
