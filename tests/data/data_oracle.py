"""What data files hold, worked out again in plain Python, to compare the package's readers with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = {"#N/A", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "NaN", "nan", "None"}
TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Refused(Exception):
    """A file that must not be read."""


@dataclass
class Table:
    """Columns of values, ``None`` where there is none."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    """Names of the columns of text."""

    def __post_init__(self) -> None:
        if not self.texts:
            self.texts = [
                name
                for name, values in self.columns.items()
                if any(isinstance(value, str) for value in values)
            ]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def decoded(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Refused("UTF-16")
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("not UTF-8") from error
    if "\0" in text:
        raise Refused("zero bytes")
    return text


def cells(text: str, separator: str) -> list[list[str]]:  # noqa: C901
    """Return the records of a CSV file, character by character; blank lines as ``[""]``."""
    records: list[list[str]] = []
    record: list[str] = []
    cell, state, at = "", "start", 0
    while at < len(text):
        char = text[at]
        if state == "quoted":
            if char == '"' and text[at + 1 : at + 2] == '"':
                cell, at = cell + '"', at + 1
            elif char == '"':
                state = "closed"
            else:
                cell += char
        elif char == separator:
            record, cell, state = [*record, cell], "", "start"
        elif char in "\r\n":
            if char == "\r" and text[at + 1 : at + 2] == "\n":
                at += 1
            records.append([*record, cell])
            record, cell, state = [], "", "start"
        elif state == "closed":
            raise Refused("text after a quote")
        elif char == '"' and state == "start":
            state = "quoted"
        else:
            cell, state = cell + char, "plain"
        at += 1
    if state == "quoted":
        raise Refused("a quote is open")
    if record or cell or state != "start":
        records.append([*record, cell])
    return records


def csv_table(content: bytes, separator: str) -> Table:
    records = cells(decoded(content), separator)
    found = [row for row in records if not (len(row) == 1 and not row[0].strip())]
    if not found:
        raise Refused("nothing in it")
    header, rows = found[0], found[1:]
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    if max(Counter(names).values()) > 1 or any(len(row) != len(names) for row in rows):
        raise Refused("names or cells")
    if not rows:
        raise Refused("no records")
    columns = zip(*rows, strict=True)
    return Table({name: typed(column) for name, column in zip(names, columns, strict=True)})


def typed(column: Sequence[str]) -> list[Any]:
    """Return a column's values by the rules of docs/tasks.md."""
    said = [cell.strip() for cell in column if cell.strip() not in {"", *MISSING}]
    for reader in (whole, TRUTH.get, number):
        if said and all(reader(cell) is not None for cell in said):
            values = [reader(cell.strip()) for cell in column]
            if reader is whole and not fits(values):
                break
            return values
    return [cell or None for cell in column]


def whole(cell: str) -> int | None:
    digits = cell[1:] if cell[:1] in ("+", "-") else cell
    plain = digits.isascii() and digits.isdecimal() and (digits == "0" or digits[0] != "0")
    return int(cell) if plain else None


def fits(values: Sequence[Any]) -> bool:
    held = [value for value in values if value is not None]
    return bool(
        (min(held) >= -(2**63) and max(held) < 2**63) or (min(held) >= 0 and max(held) < 2**64)
    )


def number(cell: str) -> float | None:
    before = cell.lstrip("+-").partition(".")[0].lower().partition("e")[0]
    try:
        value = float(cell)
    except ValueError:
        return None
    zeros = len(before) > 1 and before[0] == "0"
    return None if zeros or "_" in cell or cell.lower().strip("+-") == "nan" else value


def json_table(content: bytes, *, array: bool) -> Table:
    text = decoded(content)
    try:
        if array:
            rows = json.loads(text, object_pairs_hook=_object)
        else:  # One after the other, in lines of their own or not.
            rows, decoder = [], json.JSONDecoder(object_pairs_hook=_object)
            while text := text.lstrip(" \t\r\n"):
                row, end = decoder.raw_decode(text)
                rows, text = [*rows, row], text[end:]
    except (ValueError, RecursionError) as error:
        raise Refused("no JSON") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Refused("no objects")
    names = dict.fromkeys(name for row in rows for name in row)
    table = Table({name: [row.get(name) for row in rows] for name in names})
    for values in table.columns.values():
        kinds = {_kind(value) for value in values if value is not None}
        if len(kinds) > 1 or any(isinstance(v, int) and abs(v) >= 2**63 for v in values):
            raise Refused("types")
    return table


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def classes(values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Return which records have a class, and these classes."""
    rows = [
        row
        for row, value in enumerate(values)
        if not (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (isinstance(value, int | float) and value < 0)
        )
    ]
    held = [values[row] for row in rows]
    numbers = [value for value in held if isinstance(value, int | float)]
    if not held or any(value != int(value) for value in numbers if abs(value) < math.inf):
        raise Refused("no classes")
    if numbers and max(numbers) + 1 > max(100, 10 * len(set(numbers))):
        raise Refused("numbers far apart")
    return rows, held
