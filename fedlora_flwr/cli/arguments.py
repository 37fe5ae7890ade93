"""Arguments that several commands take, and their completions in a shell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.keys import Check, fields_by_key
from fedlora_flwr.config.names import full_name, short_name
from fedlora_flwr.config.recipes import recipe_names
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import TASKS, TRACKERS, strategy_names
from fedlora_flwr.studies.baseline_names import BASELINES, CHOICES
from fedlora_flwr.studies.sampler_names import SAMPLERS


def complete_recipe(incomplete: str) -> list[str]:
    """Return the names of recipes that begin with a text."""
    return _beginning(recipe_names(), incomplete)


def complete_key(incomplete: str) -> list[str]:
    """Return the configuration keys that begin with a text; with their section if it has a dot."""
    known = fields_by_key(RunConfig)
    return _beginning(map(full_name, known) if "." in incomplete else known, incomplete)


def complete_override(incomplete: str) -> list[str]:
    """Return ``key=`` for keys that begin with a text, or ``key=value`` for a key's names."""
    key, separator, text = incomplete.partition("=")
    if not separator:
        return [f"{name}=" for name in complete_key(incomplete)]
    with suppress(InvalidValue):
        if (short := short_name(key)) in fields_by_key(RunConfig):
            return [f"{key}={name}" for name in _beginning(names_of(short), text)]
    return []


def complete_strategies(incomplete: str) -> list[str]:
    """Return completions of a list of strategies with commas."""
    before, comma, last = incomplete.rpartition(",")
    names = names_of("strategy")
    return [before + comma + name for name in _beginning((*names, "all"), last)]


def complete_baselines(incomplete: str) -> list[str]:
    """Return completions of a comparison's list of baselines with commas."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(BASELINES if comma else CHOICES, last)]


def complete_sampler(incomplete: str) -> list[str]:
    """Return completions of what chooses the rates that a comparison tries."""
    return _beginning(SAMPLERS, incomplete)


def complete_row(incomplete: str) -> list[str]:
    """Return completions of a comparison's row: a strategy, and then keys."""
    before, space, last = incomplete.rpartition(" ")
    if not space:
        return _beginning(names_of("strategy"), incomplete)
    return [before + space + name for name in complete_override(last)]


def names_of(key: str, entry: Field[Any] | None = None) -> tuple[str, ...]:
    """Return the names that a key accepts; none for a number or a free text.

    Parameters
    ----------
    key : str
        A key of the run configuration, or a setting of a method.
    entry : Field, optional
        The key's declaration. A setting of a method needs it.
    """
    if key == "strategy":
        return strategy_names()
    if key == "task":
        return tuple(TASKS)
    if key == "trackers":
        return tuple(TRACKERS)
    entry = entry or fields_by_key(RunConfig)[key]
    if isinstance(entry.default, bool):
        return ("true", "false")
    check: Check = entry.metadata["check"]
    return check.names


def named_file(path: Path, kind: str, option: str = "--output") -> Path:
    """Return the resolved path of a file to write, whose kind is ``"a .png"`` or ``"an .html"``.

    Raises
    ------
    InvalidValue
        The file is of another kind, or its folder does not exist.
    """
    path = path.resolve()
    if path.suffix.lower() != kind.split()[-1] or not path.parent.is_dir():
        raise InvalidValue(option, str(path), f"{kind} file in a folder that exists")
    return path


def read_budgets(text: str) -> tuple[float, ...]:
    """Read privacy budgets with commas between them; return them, smallest first.

    Raises
    ------
    InvalidValue
        One of them is not a number above 0, or ``none``.
    """
    found = set()
    for part in text.split(","):
        try:
            value = math.inf if part.strip() == "none" else float(part)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise InvalidValue("epsilon", part.strip(), "a number above 0, or none")
        found.add(value)
    return tuple(sorted(found))


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (see `fedlora recipes`), or a TOML file of keys.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-c",
        metavar="KEY=VALUE",
        help="A key (see `fedlora keys`) that overrides the recipe; repeatable.",
        autocompletion=complete_override,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON and nothing else; progress goes to stderr.")
]
Output = Annotated[Path, typer.Option(help="Folder in which run directories are made.")]
