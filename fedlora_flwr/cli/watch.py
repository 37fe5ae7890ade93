"""``fedlora watch``: a run that another process is working on."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.terminal import show_line, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.server.run_dir import RunDirectory

_INTERVAL = 1.0  # Seconds between two looks at the files.


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("runs/latest"),
    web: Annotated[
        bool, typer.Option("--web", help="Also serve the report on 127.0.0.1, which reloads.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of --web; 0 takes a free one.")
    ] = 0,
) -> None:
    """Follow a run until it ends: rounds, clients, budgets left and failures; Ctrl-C stops it.

    It reads the run's folder alone, so it neither disturbs the run nor asks a client.
    """
    if not (run / "config.toml").is_file():
        raise InvalidValue("RUN", str(run), "the folder of a run, with config.toml")
    from fedlora_flwr.server.run_dir import RunDirectory

    console, run_dir = Console(), RunDirectory(run.resolve())
    with ExitStack() as stack:
        if web:
            from fedlora_flwr.cli.watch_page import serving

            show_lines(console, [("Page", stack.enter_context(serving(run_dir, port)))])
        _follow(console, run_dir)
    show_lines(console, [("Ended", _ending(run_dir))])


def _ending(run_dir: RunDirectory) -> str:
    """Say how a run ended."""
    if (summary := run_dir.summary()) is None:
        return f"without a summary, probably killed; continue it with --resume {run_dir.path}"
    return str(summary.get("error") or summary.get("end") or "completed")


def _follow(console: Console, run_dir: RunDirectory) -> None:
    """Show the run until it has ended: on a plain stream, one line per round."""
    from fedlora_flwr.cli.watch_screen import plain, screen
    from fedlora_flwr.config.recipes import load_recipe
    from fedlora_flwr.server.followed import Followed
    from fedlora_flwr.server.report import facts_of
    from fedlora_flwr.server.rounds import describe_round

    config = load_recipe(str(run_dir.path / "config.toml"))
    metric, followed = facts_of(run_dir).metric, Followed(run_dir)
    width = console.width if console.is_terminal else None
    with ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            # Before the rows, so that none is missed.
            ended = run_dir.summary_file.exists() or run_dir.abandoned()
            for row in followed.new_rounds():
                if live is None:
                    line = f"round {row['round']}/{config.num_rounds}: "
                    show_line(console, plain(line + describe_round(row, metric)))
            if live is not None:
                text = "\n".join(screen(followed, config, metric, width))
                live.update(Text(text), refresh=True)
            if ended:
                break
            time.sleep(_INTERVAL)
    if live is None:
        for line in screen(followed, config, metric, None)[2:]:
            show_line(console, line)
