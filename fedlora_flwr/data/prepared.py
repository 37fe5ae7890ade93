"""Preprocessing that a machine does once. Its results are kept in Arrow files.

The key of a result consists of the data set's fingerprint, the whole text of the function's module,
the arguments that the function was made with, and the versions of packages. All processes map the
same file, so N workers hold one copy in memory.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from fedlora_flwr.data.cached_file import require_writable
from fedlora_flwr.data.fingerprint import content_digest
from fedlora_flwr.data.unusable import named
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.files import cache_folder, read_or_make

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_FORMAT = 1
_ROWS = 256
# Rows are picked fastest from few large chunks. While one is written, three are in memory.
_CHUNK = 64 * 2**20

Columns = Mapping[str, Any]


def prepare(
    dataset: Dataset,
    function: Callable[[dict[str, list[Any]]], Columns],
    key_parts: Mapping[str, Any],
    columns: Sequence[str],
    *,
    packages: Sequence[str] = (),
    console: Console | None = None,
) -> Dataset:
    """Apply ``function`` to all records, or return the result from the cache.

    If several processes ask at the same time, one works and the others wait. A damaged or
    unfinished copy is made again.

    Parameters
    ----------
    dataset : Dataset
        The records, e.g. from `fedlora_flwr.data.sources.load_split`.
    function : Callable
        Maps columns of up to 256 records (lists; decoded pictures) to new columns of the same
        length: lists, or arrays with the record as the first axis. Each record's values must not
        depend on the other records. Lists of numbers may differ in length.
    key_parts : Mapping[str, Any]
        All that the result depends on beside the function's module, in JSON types: the tokenizer,
        the length, the size of pictures. Values that a closure holds belong here.
    columns : Sequence[str]
        Columns to keep, either new ones or those of the data set; at least one.
    packages : Sequence[str] (default: ())
        Packages on whose versions the result depends, as pip names them.
    console : Console, optional
        Shows progress if it is a terminal; standard error if not given.

    Returns
    -------
    Dataset
        The same number of records in the same order, memory-mapped.

    Raises
    ------
    InvalidValue
        A column is missing or of another length, a picture cannot be decoded, or the cache folder
        cannot be written to.
    """
    key = _key(dataset, function, key_parts, columns, packages)
    shown = console or Console(stderr=True)
    made = kept(
        cache_folder() / "datasets" / key,
        lambda: _tables(_batches(dataset, function, columns, shown)),
        len(dataset),
    )
    assert made is not None  # A data set has at least one record.
    return made


def kept(
    folder: Path, tables: Callable[[], Iterable[pa.Table]], length: int | None = None
) -> Dataset | None:
    """Return records from a folder of the cache; make them if they are missing or damaged.

    Parameters
    ----------
    folder : Path
        The folder of the records. Its name contains a hash of all that they depend on.
    tables : Callable
        Makes the records, as tables of one schema.
    length : int, optional
        The number of records, if it is known.

    Returns
    -------
    Dataset or None
        The records, memory-mapped; ``None`` if ``tables`` makes none.

    Raises
    ------
    InvalidValue
        The cache folder cannot be written to, or ``tables`` raises it.
    """
    if (ready := _intact(folder, length)) is not None:
        return ready
    require_writable(folder.parent)
    try:
        return read_or_make(
            folder, lambda: _intact(folder, length), lambda draft: _make(draft, _read(tables))
        )
    except _NoRecords:
        return None
    except _Unreadable as trouble:
        raise trouble.error from trouble.error.__cause__


class _NoRecords(Exception):
    """There are no records to write."""


class _Unreadable(Exception):
    """The records could not be read. The cause is not the cache."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def _read(tables: Callable[[], Iterable[pa.Table]]) -> Iterator[pa.Table]:
    try:
        yield from tables()
    except OSError as error:
        raise _Unreadable(error) from error


def _key(
    dataset: Dataset,
    function: Callable[..., Any],
    key_parts: Mapping[str, Any],
    columns: Sequence[str],
    packages: Sequence[str],
) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    parts = {
        "format": _FORMAT,
        "records": [dataset._fingerprint, len(dataset)],
        "function": [named.__module__, named.__qualname__, _source(named)],
        "parts": dict(key_parts),
        "columns": list(columns),
        "packages": {name: version(name) for name in sorted(packages)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _source(function: Callable[..., Any]) -> str:
    """Return the whole text of the function's module, which includes the function's helpers."""
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return ""  # The function was typed at a prompt.


def _intact(folder: Path, length: int | None) -> Dataset | None:
    """Open a result if it exists and is undamaged."""
    import datasets
    import pyarrow as pa

    data = folder / "data.arrow"
    try:
        wanted = (folder / "digest").read_text(encoding="ascii")
        if content_digest(data) != wanted:
            return None
        dataset = datasets.Dataset.from_file(str(data))
    except (OSError, ValueError, pa.ArrowInvalid):
        return None
    return dataset if length in (None, len(dataset)) else None


def _make(draft: Path, tables: Iterable[pa.Table]) -> None:
    draft.mkdir(mode=0o700)
    if not _write(draft / "data.arrow", tables):
        raise _NoRecords
    (draft / "digest").write_text(content_digest(draft / "data.arrow"), encoding="ascii")


def _batches(
    dataset: Dataset, function: Callable[..., Columns], columns: Sequence[str], console: Console
) -> Iterator[Columns]:
    for start in track(
        range(0, len(dataset), _ROWS),
        "Preparing records (once)",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        try:
            before = dataset[start : start + _ROWS]
            after = {**before, **function(before)}
        except (FedLoRAError, AssertionError, MemoryError, RuntimeError):
            raise
        except Exception as error:
            # Pillow and tokenizers raise errors of many types for a bad record.
            raise named(dataset, function, range(start, len(dataset))[:_ROWS]) or error from error
        yield _chosen(after, columns, min(_ROWS, len(dataset) - start))


def _chosen(found: Columns, columns: Sequence[str], length: int) -> Columns:
    for name in columns:
        if name not in found or len(found[name]) != length:
            have = {key: len(values) for key, values in found.items()}
            raise InvalidValue("columns", name, f"a column of {length} values, among {have}")
    return {name: found[name] for name in columns}


def _write(path: Path, tables: Iterable[pa.Table]) -> bool:
    """Write an Arrow stream in chunks of about 64 MiB; return whether there were any rows."""
    import pyarrow as pa

    held: list[pa.Table] = []
    with path.open("wb") as stream:
        writer: Any = None
        for table in tables:
            if not table.num_rows:
                continue
            if writer is None:
                writer = pa.ipc.new_stream(stream, table.schema)
            held.append(table)
            if sum(part.nbytes for part in held) >= _CHUNK:
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held = []
        if writer is None:
            return False
        if held:
            writer.write_table(pa.concat_tables(held).combine_chunks())
        writer.close()
    return True


def _tables(batches: Iterator[Columns]) -> Iterator[pa.Table]:
    """Turn batches into tables, all with the column types of the first."""
    schema: pa.Schema | None = None
    for batch in batches:
        table = _table(batch, schema)
        schema = table.schema
        yield table


def _table(batch: Columns, schema: pa.Schema | None) -> pa.Table:
    import datasets
    import pyarrow as pa

    arrays = {}
    for name, values in batch.items():
        wanted = None if schema is None else schema.field(name).type
        try:
            arrays[name] = _array(values, wanted).cast(wanted) if wanted else _array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            reason = f"a column of one type, which is {wanted} in the first records ({error})"
            raise InvalidValue("columns", name, reason) from error
    table = pa.table(arrays)
    if schema is None:
        schema = datasets.Features.from_arrow_schema(table.schema).arrow_schema
    return table.replace_schema_metadata(schema.metadata)


def _array(values: Any, wanted: pa.DataType | None = None) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    if isinstance(values, np.ndarray) and values.ndim > 1:
        flat: pa.Array = pa.array(np.ascontiguousarray(values).reshape(-1))
        # Fixed-size lists keep the shape in their type, so whole rows are copied at once.
        for size in reversed(values.shape[1:]):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat
    return pa.array(values, wanted)
