"""Hook of MkDocs: lists that pages take from the code itself, so that they are never out of date.

A page has a mark at the end of a line where a list belongs. The line tells whoever reads the file
how to see the list without the site. `LISTS` says which mark stands for which list.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field
from typing import Any, cast

import click
from typer.main import get_command

import fedlora_flwr
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig, Value
from fedlora_flwr.config.keys import allowed_values, fields_by_key
from fedlora_flwr.config.methods import settings_of_methods
from fedlora_flwr.config.names import by_section, short_name
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.strategies.base import FedLoRA


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put lists in the place of the lines with their marks."""
    lines = markdown.split("\n")
    for mark, made in LISTS.items():
        lines = [made() if line.endswith(mark) else line for line in lines]
    return "\n".join(lines)


def configuration() -> str:
    """Return every key, by section."""
    entries = fields_by_key(RunConfig)
    entries.update(settings_of_methods(entries))
    parts = []
    for section, names in by_section(entries).items():
        rows = [_key(name, entries[short_name(f"{section}.{name}")]) for name in names]
        parts.append(f"## {section}\n\n{_about(section)}{_table(_KEYS, rows)}")
    return "\n\n".join(parts)


_KEYS = ("key", "default", "what it is", "allowed", "on a device, decided by")


def _key(name: str, entry: Field[Any]) -> tuple[str, ...]:
    about = entry.metadata
    return (
        f"`{name}`", f"`{toml_value(cast(Value, entry.default))}`", about["about"],
        allowed_values(entry, "check"), str(about["decides"]),
    )  # fmt: skip


def _about(section: str) -> str:
    """Return the sentence that a section's file says of it."""
    try:
        name = f"fedlora_flwr.config.sections.{section.replace('-', '_')}"
        text = importlib.import_module(name).__doc__ or ""
    except ModuleNotFoundError:
        return "Settings of a strategy.\n\n"
    _, _, said = text.strip().splitlines()[0].partition(": ")
    return f"{said[0].upper()}{said[1:]}\n\n"


def commands() -> str:
    """Return every command with its arguments and options."""
    return "\n\n".join(_command(words, one) for words, one in _walk(get_command(app)))


def _walk(group: Any, before: str = "fedlora") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        words = f"{before} {name}"
        if hasattr(command, "commands"):
            yield from _walk(command, words)
        else:
            yield words, command


def _command(words: str, command: Any) -> str:
    context = click.Context(command)
    rows = [_parameter(each, context) for each in command.params]
    about = (command.help or "").strip()
    return f"### {words}\n\n{about}\n\n{_table(('argument or option', 'what it is'), rows)}"


def _parameter(parameter: Any, context: click.Context) -> tuple[str, str]:
    if isinstance(parameter, click.Argument) or not hasattr(parameter, "is_flag"):
        name = f"`{parameter.make_metavar(context)}`"
    else:
        metavar = parameter.make_metavar(context).partition(" RANGE")[0]
        value = "" if parameter.is_flag else f" {metavar}"
        name = f"`{', '.join(parameter.opts)}{value}`"
    said = getattr(parameter, "help", None) or ""
    if parameter.required:
        return name, f"{said} Required.".strip()
    if parameter.default in (None, False) or callable(parameter.default):
        return name, said
    return name, f"{said} Default: `{parameter.default}`.".strip()


def names(tier: str) -> str:
    """Return the directives under which the public names of a tier are explained."""
    # By name: type checkers read a stub, which has the public names alone.
    homes: Mapping[str, str] = vars(fedlora_flwr)[tier]
    own = "\n    options: {merge_init_into_class: false}"
    return "\n\n".join(
        f"::: fedlora_flwr.{home}.{name}{own if name in _methods() else ''}"
        for name, home in homes.items()
    )


def _methods() -> list[str]:
    """Return the strategies whose arguments are those of their base, which shows them."""
    found = {name: getattr(fedlora_flwr, name) for name in vars(fedlora_flwr)["STRATEGIES"]}
    return [n for n, c in found.items() if issubclass(c, FedLoRA) and "__init__" not in vars(c)]


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


LISTS: Mapping[str, Callable[[], str]] = {
    "<!-- every key -->": configuration,
    "<!-- every command -->": commands,
    "<!-- every run -->": lambda: names("RUNS"),
    "<!-- every strategy -->": lambda: names("STRATEGIES"),
    "<!-- every client and engine -->": lambda: names("CLIENT_AND_ENGINE"),
    "<!-- every block -->": lambda: names("BLOCKS"),
}
