"""CSV files as tables: text stays text, and whole columns become numbers by stated rules."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_flwr.data.plain_text import plain_text, reason, unreadable

if TYPE_CHECKING:
    import pyarrow as pa

# Words that other programs write for a missing number. A text column keeps them as text.
MISSING_NUMBERS = ("#N/A", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "NaN", "nan", "None")
_TRUTH = ("true", "True", "TRUE")
_UNTRUTH = ("false", "False", "FALSE")
# A value with leading zeros, such as 007, is an identifier, which a number would change.
_WHOLE = r"[+-]?(0|[1-9][0-9]*)"
_NUMBER = rf"({_WHOLE}(\.[0-9]*)?|[+-]?\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|Infinity)"
_ROWS = 10_000
_NAMES = {",": "commas", "\t": "tabs"}


def csv_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the records of CSV or TSV files as one table.

    The first line names the columns. Blank lines are not records, and an empty cell is a missing
    value. A column becomes whole numbers, truth values or numbers if all its cells can be read that
    way, apart from empty cells and words for a missing number (`MISSING_NUMBERS`), which become
    missing values. All other columns stay text, and their cells are unchanged.

    Parameters
    ----------
    paths : Sequence[Path]
        Files with the same columns, at least one.

    Raises
    ------
    InvalidValue
        A file is not UTF-8, a record has more or fewer cells than there are columns, quotes do not
        match, or columns have the same name.
    """
    import pyarrow as pa

    found: list[pa.Table] = []
    for path in paths:
        if (table := _cells(path)) is None:
            continue
        if found and table.column_names != found[0].column_names:
            expected = f"the columns {found[0].column_names} of the files before it"
            raise unreadable(path, f"{expected}, but it has {table.column_names}")
        found.append(table)
    if found:
        cells = pa.concat_tables(found)
        yield pa.table({name: _typed(cells.column(name)) for name in cells.column_names})


def _cells(path: Path) -> pa.Table | None:
    """Return all cells of a file as text, or ``None`` if the file is empty."""
    import pyarrow as pa

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with _long_cells():
        records = _records(path, separator)
        _, header = next(records, (0, []))
        if not header:
            return None
        if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), "")):
            found = f"{separator!r} between cells, but the first line has {other!r}"
            raise unreadable(path, f"{found}. Save it with {_NAMES[separator]}")
        names = _column_names(path, header)
        schema = pa.schema([(name, pa.string()) for name in names])
        batches, held = [], []
        for line, record in records:
            if len(record) != len(names):
                has = f"{len(names)} cells in each record, but the one in line {line} has"
                quotes = "Put cells that contain the separator in double quotes"
                raise unreadable(path, f"{has} {len(record)}. {quotes}")
            held.append(record)
            if len(held) == _ROWS:
                batches.append(_batch(held, schema))
                held = []
        return pa.Table.from_batches([*batches, _batch(held, schema)], schema)


def _batch(records: list[list[str]], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = zip(*records, strict=True) if records else ([] for _ in schema)
    arrays = [pa.array(column, pa.string()) for column in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of its first line; skip blank lines."""
    reader = csv.reader(io.StringIO(plain_text(path), newline=""), delimiter=separator, strict=True)
    width, begin = 0, 1
    try:
        for record in reader:
            blank = not record or (width != 1 and len(record) == 1 and not record[0].strip())
            if not blank:
                width = width or len(record)
                yield begin, record
            begin = reader.line_num + 1
    except csv.Error as error:
        fix = 'Write a quote inside a quoted cell twice ("")'
        text = f"quotes that match, but those in the record of line {begin} do not"
        raise unreadable(path, f"{text} ({reason(error)}). {fix}") from error


def _column_names(path: Path, header: list[str]) -> list[str]:
    # A saved table often has an index column without a name. Pandas gives it this name, too.
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    require_different(path, names)
    return names


def require_different(path: Path, names: Sequence[str]) -> None:
    """Refuse a file in which several columns have the same name.

    Raises
    ------
    InvalidValue
        A name occurs more than once. The message names the file and the columns.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        expected = f"a different name for each column, but {twice} occur more than once"
        raise unreadable(path, f"{expected}. Rename or remove them")


def _typed(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Turn a column of text into numbers or truth values, if all its cells allow that."""
    import pyarrow as pa
    import pyarrow.compute as pc

    empty = pc.equal(cells, "")
    if pc.all(empty).as_py():
        return pa.chunked_array([pa.nulls(len(cells))])
    trimmed = pc.utf8_trim_whitespace(cells)
    gap = pc.is_in(trimmed, value_set=pa.array(["", *MISSING_NUMBERS]))
    said = trimmed.filter(pc.invert(gap))
    kind = _kind(said) if len(said) else None
    if kind is None:
        return pc.if_else(empty, pa.scalar(None, pa.string()), cells)
    held = pc.if_else(gap, pa.scalar(None, pa.string()), trimmed)
    if kind == pa.bool_():
        truth: pa.ChunkedArray = pc.is_in(held, value_set=pa.array(_TRUTH))
        return pc.if_else(gap, pa.scalar(None, pa.bool_()), truth)
    return pc.replace_substring_regex(held, r"^\+", "").cast(kind)


def _kind(said: pa.ChunkedArray) -> pa.DataType | None:
    """Return the type of a column's cells that are not missing, or ``None`` for text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def all_are(pattern: str) -> bool:
        return bool(pc.all(pc.match_substring_regex(said, rf"^({pattern})$")).as_py())

    if all_are(_WHOLE):
        plain = pc.replace_substring_regex(said, r"^\+", "")
        for kind in (pa.int64(), pa.uint64()):
            try:
                plain.cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
        return None  # Longer numbers are identifiers, such as account numbers.
    if pc.all(pc.is_in(said, value_set=pa.array([*_TRUTH, *_UNTRUTH]))).as_py():
        return pa.bool_()
    return pa.float64() if all_are(_NUMBER) else None


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters per cell."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
