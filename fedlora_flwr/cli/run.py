"""``fedlora run`` and ``fedlora simulate``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Output, Overrides, Recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import config_file
from fedlora_flwr.errors import FedLoRAError, InvalidValue, require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import show_json, show_lines, told

if TYPE_CHECKING:
    from fedlora_flwr.server.checkpoint import Checkpoint

RECIPE = "digits"
Resume = Annotated[
    Path | None,
    typer.Option(help="Folder of a run to continue after its last round; leave RECIPE out."),
]


def run(
    recipe: Recipe = RECIPE,
    overrides: Overrides = None,
    as_json: AsJson = False,
    output: Output = Path("runs"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers; by default one per core.")
    ] = None,
    resume: Resume = None,
) -> None:
    """Run a recipe with `flwr run` on Flower's simulation engine."""
    config = _read(recipe, overrides, resume)  # Bad input is told before the slow imports.
    require(*extras_of(config.task), "simulation")
    _launch("run", "flower", config, as_json, output, workers)


def simulate(
    recipe: Recipe = RECIPE,
    overrides: Overrides = None,
    as_json: AsJson = False,
    output: Output = Path("runs"),
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that serve clients; 1 = this one.")
    ] = 1,
    resume: Resume = None,
) -> None:
    """Run a recipe without Ray and without a server; the same seed gives the same arrays."""
    config = _read(recipe, overrides, resume)
    require(*extras_of(config.task), "flwr_datasets")
    _launch("simulate", "process", config, as_json, output, workers)


def _read(recipe: str, overrides: list[str] | None, resume: Path | None) -> RunConfig:
    """Read a recipe, or the recipe of a run that is to be continued."""
    if resume is None:
        return read_recipe(recipe, overrides)
    if recipe != RECIPE:
        raise InvalidValue("recipe", recipe, "no recipe with --resume, which reads the run's own")
    found = config_file(resume)
    return replace(read_recipe(str(found), overrides), resume=str(found.parent))


def _launch(
    command: str, engine: str, config: RunConfig, as_json: bool, output: Path, workers: int | None
) -> None:
    with uncollected():
        from fedlora_flwr.cli.run_screen import (
            Screen,
            closing_rows,
            how_to_continue,
            next_steps,
            report_of,
            what_is_kept,
        )
        from fedlora_flwr.simulations.launch import open_run

    console = Console(stderr=as_json)
    opened = open_run(config, output, engine, workers, console, partial(_resumed, console))
    run_dir = opened.run_dir
    try:
        with Screen(console, opened.prepared) as screen:
            summary = opened.play(screen.round)
    except BrokenPipeError:
        raise
    except Exception as error:
        lines = [told(error, run_dir.log), f"Log: {run_dir.log}"]
        if again := how_to_continue(command, run_dir):
            lines.append(f"To continue after its last round: {again}")
        raise FedLoRAError("\n".join(lines)) from error
    except KeyboardInterrupt:
        kept = [*report_of(run_dir), *what_is_kept(command, run_dir)]
        show_lines(console, [("Results", str(run_dir.path)), *kept])
        raise
    show_lines(console, [*closing_rows(summary), *next_steps(config, run_dir)])
    if as_json:
        show_json(run_dir.summary())


def _resumed(console: Console, checkpoint: Checkpoint, damaged: list[str]) -> None:
    lines = [("Warning", sentence) for sentence in damaged]
    show_lines(console, [("Resumed", f"after round {checkpoint.round}"), *lines])
