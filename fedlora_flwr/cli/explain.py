"""``fedlora recipes`` and ``fedlora keys``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, complete_key, names_of
from fedlora_flwr.config import RunConfig, Value
from fedlora_flwr.config.keys import allowed_values, fields_by_key, type_words
from fedlora_flwr.config.methods import settings_of_methods
from fedlora_flwr.config.names import by_section, full_name, short_name
from fedlora_flwr.config.recipes import about_recipe, purpose_of, recipe_names
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.errors import unknown
from fedlora_flwr.places import TASKS
from fedlora_flwr.terminal import Table, show, show_json, show_line, show_lines

_PAPER = "paper"
_OWN_DATA = (
    "FILE.toml",
    "own data",
    "A recipe of your own, for CSV, Parquet or JSON lines: docs/how_to/bring_my_data.md has one.",
)


def recipes(
    every: Annotated[
        bool, typer.Option("--all", help="List the recipes of published papers, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with the package; those to begin with come first."""
    found = [(name, purpose_of(name), about_recipe(name)) for name in recipe_names()]
    if as_json:
        show_json([dict(zip(("recipe", "for", "about"), row, strict=True)) for row in found])
    else:
        short = [row for row in found if every or row[1] != _PAPER]
        rows = [short[0], _OWN_DATA, *short[1:]]
        if hidden := len(found) - len(short):
            rows.append((f"{_PAPER}/…", _PAPER, f"{hidden} more, which --all lists."))
        show(Console(), Table(("recipe", "for", "about"), rows, "<<<"))


def keys(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys or sections to explain in full; by default, all keys are listed in short.",
            autocompletion=complete_key,
        ),
    ] = None,
    who_decides: Annotated[
        bool,
        typer.Option("--who-decides", help="Who decides each value on a device, as Markdown."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every configuration key with its default and meaning, or explain some in full."""
    if who_decides:
        from fedlora_flwr.config.authority import markdown

        print(markdown(), end="")
        return
    entries = fields_by_key(RunConfig)
    if not names or not {*entries, *by_section(entries)} >= {short_name(name) for name in names}:
        entries.update(settings_of_methods(entries))
    chosen = {key: entries[key] for key in _chosen(names, entries)} if names else entries
    console = Console()
    if as_json:
        show_json([_explained(name, entry) for name, entry in chosen.items()])
    elif names:
        _show_in_full(console, chosen)
    else:
        rows = [
            (*_parts(k), toml_value(cast(Value, e.default)), e.metadata["about"])
            for k, e in chosen.items()
        ]
        show(console, Table(("section", "key", "default", "meaning"), rows, "<<<<"))


def _chosen(names: Sequence[str], entries: Mapping[str, Any]) -> Iterator[str]:
    """Yield the named keys of ``entries``. A name is a short key, a full key or a section."""
    sections = by_section(entries)
    for name in names:
        if (key := short_name(name)) in entries:
            yield key
        elif name in sections:
            yield from (short_name(f"{name}.{key}") for key in sections[name])
        else:
            raise unknown("key or section", name, (*entries, *sections))


def _parts(key: str) -> tuple[str, str]:
    section, _, name = full_name(key).partition(".")
    return section, name


_OPEN = {
    "task": ("or your own, as module:function",),
    "strategy": ("or your own, as module:Class",),
}


def _explained(key: str, entry: Field[Any]) -> dict[str, Any]:
    about, names = entry.metadata, names_of(key, entry)
    listed = ", ".join((*names, *_OPEN.get(key, ())))
    return {
        "section": _parts(key)[0],
        "key": key,
        "about": about["about"],
        "type": type_words(entry),
        "default": entry.default,
        "allowed": listed or allowed_values(entry, "check"),
        "names": list(names),
        "decides": str(about["decides"]),
        "why": about["why"],
        "default_on_device": about["on_device"],
        "allowed_on_device": listed or allowed_values(entry),
    }


def _show_in_full(console: Console, chosen: Mapping[str, Field[Any]]) -> None:
    for number, (key, entry) in enumerate(chosen.items()):
        if number:
            show_line(console, "")
        found = _explained(key, entry)
        lines = [
            ("Key", full_name(key)),
            ("Meaning", found["about"]),
            ("Default", toml_value(found["default"])),
            ("Type", found["type"]),
            ("Allowed", found["allowed"]),
        ]
        if key == "task":  # Each task's model, columns and figure.
            lines += [("", f"{name}: {known.about}") for name, known in TASKS.items()]
        lines.append(("Decides", f"on a device: {found['decides']}. {found['why']}"))
        if found["default_on_device"] != found["default"]:
            lines.append(("", f"default there: {toml_value(found['default_on_device'])}"))
        if found["allowed_on_device"] != found["allowed"]:
            lines.append(("", f"allowed there: {found['allowed_on_device']}"))
        show_lines(console, lines)
