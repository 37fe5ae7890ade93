"""Conversion of recipes without sections to recipes with sections."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from fedlora_flwr.config.names import full_name
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.config.sections import SECTIONS
from fedlora_flwr.config.toml import read_toml
from fedlora_flwr.errors import InvalidValue


def is_flat(path: Path) -> bool:
    """Tell whether a recipe has keys that are in no section.

    Raises
    ------
    InvalidValue
        The file cannot be read.
    """
    return any(
        not isinstance(value, dict) and "." not in key for key, value in read_toml(path).items()
    )


def with_sections(path: Path) -> str:
    """Return a recipe's text with each key in the table of its section.

    Every comment is kept. A comment at the end of a line stays there; a comment line stays above
    the key that follows it. Comments at the top of the file stay at the top.

    Parameters
    ----------
    path : Path
        The recipe, a TOML file.

    Raises
    ------
    InvalidValue
        The file cannot be read, its configuration cannot be used, or the converted text would have
        another configuration.
    """
    config = RunConfig.of(read_toml(path))
    head, tables, end = _cut(path.read_text(encoding="utf-8-sig"))
    order = [*SECTIONS, *(name for name in tables if name not in SECTIONS)]
    parts = [f"[{name}]\n{tables[name]}" for name in order if name in tables]
    text = head + "\n".join(parts) + end
    if RunConfig.of(tomllib.loads(text)) != config:
        allowed = "a recipe that can be converted; write its sections by hand (see `fedlora keys`)"
        raise InvalidValue("recipe", str(path), allowed)
    return text


def _cut(text: str) -> tuple[str, dict[str, str], str]:
    """Return the comments at the top, the lines of each section, and the comments at the end."""
    head, comments, table = "", "", ""
    tables: dict[str, str] = {}
    for statement in _statements(text):
        if statement.startswith("["):
            table = statement.strip().partition("#")[0].strip(" []")
            continue
        if statement.isspace() or statement.startswith("#"):
            comments += "" if statement.isspace() else statement
            continue
        key = statement.partition("=")[0].strip()
        section, _, name = full_name(f"{table}.{key}" if table else key).rpartition(".")
        if not tables:
            head, comments = comments, ""
        entry = f"{name} {statement[statement.index('=') :]}"
        tables[section] = tables.get(section, "") + comments + entry
        comments = ""
    return head, tables, comments


def _statements(text: str) -> Iterator[str]:
    """Yield a TOML file's comments, empty lines, headers and entries, each with its line break."""
    statement = ""
    for line in text.splitlines():
        statement += line.strip() + "\n" if not statement else line + "\n"
        try:
            tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # The value has more lines.
        yield statement
        statement = ""
