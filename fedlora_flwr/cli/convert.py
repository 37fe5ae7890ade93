"""``fedlora convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.config.convert import is_flat, with_sections
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.environment import own_program
from fedlora_flwr.files import replace_file
from fedlora_flwr.terminal import show_line


def convert(
    recipe: Annotated[Path, typer.Argument(help="A recipe without sections: a TOML file.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write it; the recipe itself if not given.")
    ] = None,
) -> None:
    """Put each key of a recipe into its section, and keep the comments."""
    text = with_sections(recipe)
    target = output or recipe
    if target == recipe and not is_flat(recipe):
        show_line(Console(), f"{recipe} has sections already. Nothing was changed.")
        return
    replace_file(target.resolve(), text.encode())
    show_line(Console(), f"{target} has sections now, and means the same as before.")


def read_recipe(name: str, overrides: list[str] | None = None) -> RunConfig:
    """Load a recipe for a command, and say on stderr if its file should be converted.

    Parameters and errors are those of `fedlora_flwr.config.recipes.load_recipe`.
    """
    config = load_recipe(name, overrides)
    if name.endswith(".toml") and is_flat(Path(name)):
        command = f"{own_program('fedlora')} convert {shlex.quote(name)}"
        line = f"{name} has no sections. It is read as before; `{command}` adds them."
        show_line(Console(stderr=True), line)
    return config
