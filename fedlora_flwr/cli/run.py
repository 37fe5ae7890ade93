"""``fedlora run`` and ``fedlora simulate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Output, Overrides, Recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import FedLoRAError, InvalidValue, require
from fedlora_flwr.processes import uncollected
from fedlora_flwr.tasks.registry import extras_of
from fedlora_flwr.terminal import show_json, show_lines, told

if TYPE_CHECKING:
    from fedlora_flwr.server.run_dir import RunDirectory

RECIPE, CONFIG = "digits", "config.toml"
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
    with uncollected():
        from fedlora_flwr.simulations.runner import run_on_flower

    _launch("run", partial(run_on_flower, workers=workers), config, as_json, output)


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
    with uncollected():
        from fedlora_flwr.simulations.runner import run_in_process

    _launch("simulate", partial(run_in_process, workers=workers), config, as_json, output)


def _read(recipe: str, overrides: list[str] | None, resume: Path | None) -> RunConfig:
    """Read a recipe, or the recipe of a run that is to be continued."""
    if resume is None:
        return read_recipe(recipe, overrides)
    if recipe != RECIPE:
        raise InvalidValue("recipe", recipe, "no recipe with --resume, which reads the run's own")
    found = resume.resolve() / CONFIG
    if not found.exists():
        raise InvalidValue("resume", str(resume), "the folder of a run that has begun")
    return replace(read_recipe(str(found), overrides), resume=str(resume.resolve()))


def _launch(
    command: str,
    launch: Callable[..., dict[str, Any]],
    config: RunConfig,
    as_json: bool,
    output: Path,
) -> None:
    from fedlora_flwr.cli.run_screen import (
        Screen,
        closing_rows,
        how_to_continue,
        next_steps,
        report_of,
        what_is_kept,
    )
    from fedlora_flwr.processes.workers import log_to_file
    from fedlora_flwr.server.endings import recorded
    from fedlora_flwr.server.keeper import read_checkpoint, resumable
    from fedlora_flwr.server.run_dir import check_unused
    from fedlora_flwr.simulations.runner import prepare_run

    console = Console(stderr=as_json)
    if config.resume:
        checkpoint, damaged = resumable(config)
        show_lines(console, [("Resumed", f"after round {checkpoint.round}"), *_warned(damaged)])
    elif config.run_dir:
        check_unused(Path(config.run_dir))
    prepared = prepare_run(config, console)
    run_dir = _folder(config, output)
    try:
        with recorded(run_dir, config), Screen(console, prepared) as screen:
            log_to_file(run_dir.log, [*prepared.records, *prepared.notes])
            _write_split(run_dir, config)
            if config.resume:  # Before the rounds are followed.
                read_checkpoint(config, run_dir)
            summary = launch(prepared, run_dir, screen.round)
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


def _folder(config: RunConfig, output: Path) -> RunDirectory:
    """Open the folder of the run to continue, the one that is named, or a new one."""
    from fedlora_flwr.server.run_dir import RunDirectory

    if config.resume:
        return RunDirectory(Path(config.resume), resume=True)
    if config.run_dir:
        return RunDirectory(Path(config.run_dir))
    return RunDirectory.new(output.resolve(), config)


def _write_split(run_dir: RunDirectory, config: RunConfig) -> None:
    """Keep how the records are dealt out, which only a run on one machine knows."""
    from fedlora_flwr.forecast.split_table import split_counts, split_json

    run_dir.write_split(split_json(split_counts(config), config))


def _warned(damaged: list[str]) -> list[tuple[str, str]]:
    return [("Warning", sentence) for sentence in damaged]
