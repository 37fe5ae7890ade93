"""JSON files as tables: one record per line, or one array of records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_flwr.data.plain_text import line_of, plain_text, reason, unreadable
from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    import pyarrow as pa

_BLANK = re.compile(r"[ \t\r\n]*")
_ROWS = 10_000
_FIX = "Each record is one JSON object; correct or remove this one"

Row = tuple[int, dict[str, Any]]


def json_tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the records of JSON or JSON lines files as one table.

    A value that a record does not have is missing. Text stays text, even if it looks like a
    number or a date.

    Parameters
    ----------
    paths : Sequence[Path]
        Files whose records are objects, in an array or one after the other.

    Raises
    ------
    InvalidValue
        A file is not UTF-8 or not JSON, an object says a key twice, or a column has values of
        several types. Names the file, and the line where it is known.
    """
    import pyarrow as pa

    tables = [_table(path, rows) for path in paths for rows in _batches(path)]
    if not tables:
        return
    try:
        yield pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        names = ", ".join(path.name for path in paths)
        expected = f"columns of one type in all records of {names} ({reason(error)})"
        raise unreadable(paths[0], expected) from error


def _batches(path: Path) -> Iterator[list[Row]]:
    held: list[Row] = []
    for row in _records(path):
        held.append(row)
        if len(held) == _ROWS:
            yield held
            held = []
    if held:
        yield held


def _records(path: Path) -> Iterator[Row]:
    """Yield each record with the line that it begins in."""
    text = plain_text(path)
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at = _after_blanks(text, 0)
    array = text[at : at + 1] == "["
    if array:
        at = _after_blanks(text, at + 1)
    closed = array and text[at : at + 1] == "]"
    line, counted = 1, 0
    while at < len(text) and not closed:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value(decoder, text, at, path, line)
        if not isinstance(value, dict):
            raise unreadable(path, f"JSON objects, but line {line} has another value. {_FIX}")
        yield line, value
        at = _after_blanks(text, at)
        if array:
            at, closed = _next(text, at, path)
    if array and (not closed or _after_blanks(text, at + 1) < len(text)):
        allowed = "one JSON array and nothing after it. Complete the array, or remove the rest"
        raise unreadable(path, allowed)


def _value(decoder: json.JSONDecoder, text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        found = f"JSON, but line {error.lineno} is not ({error.msg}, column {error.colno})"
        raise unreadable(path, f"{found}. {_FIX}") from error
    except (ValueError, RecursionError) as error:
        found = f"JSON, but the record in line {line} cannot be read ({reason(error)})"
        raise unreadable(path, f"{found}. {_FIX}") from error


def _next(text: str, at: int, path: Path) -> tuple[int, bool]:
    """Return where the next record of an array begins, and whether the array is over."""
    mark = text[at : at + 1]
    if mark not in (",", "]"):
        found = f"JSON, but line {line_of(text, at)} lacks a comma between two records"
        raise unreadable(path, f"{found}, or the file is cut off")
    return (at, True) if mark == "]" else (_after_blanks(text, at + 1), False)


def _after_blanks(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object has the keys {twice} more than once")
    return found


def _table(path: Path, rows: list[Row]) -> pa.Table:
    import pyarrow as pa

    names = dict.fromkeys(name for _, row in rows for name in row)
    return pa.table({name: _column(path, name, rows) for name in names})


def _column(path: Path, name: str, rows: list[Row]) -> pa.Array:
    import pyarrow as pa

    values = [row.get(name) for _, row in rows]
    # Arrow itself would take a truth value among numbers for a number.
    if len({_type(value) for value in values if value is not None}) > 1:
        raise _mixed(path, name, rows)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise _misfit(path, name, rows, error) from error


def _mixed(path: Path, name: str, rows: list[Row]) -> InvalidValue:
    """Say which record has a value of another type than the first one."""
    said = [(line, _type(row[name])) for line, row in rows if row.get(name) is not None]
    (first, usual), *others = said
    line, kind = next((line, kind) for line, kind in others if kind != usual)
    found = f"values of one type in column {name!r}, but line {first} has {usual}"
    return unreadable(path, f"{found} and line {line} has {kind}")


def _misfit(path: Path, name: str, rows: list[Row], error: Exception) -> InvalidValue:
    """Say which record has a value that no table can hold."""
    import pyarrow as pa

    for line, row in rows:
        try:
            pa.array([row.get(name)])
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as own:
            found = f"values that a table can hold, but column {name!r} of the record in line"
            return unreadable(path, f"{found} {line} has another ({reason(own)})")
    return unreadable(path, f"values of one type in column {name!r} ({reason(error)})")


def _type(value: Any) -> str:
    kinds = {bool: "a truth value", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
