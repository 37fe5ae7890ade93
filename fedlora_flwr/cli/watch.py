"""``fedlora watch``: a run, or a comparison, that another process is working on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.terminal import show_line, show_lines

_INTERVAL = 1.0  # Seconds between two looks at the files.


class Watched(Protocol):
    """What is watched, read from its folder."""

    def news(self) -> Iterable[str]:
        """Read what is new, and return a line on each thing that has ended since."""
        ...

    def lines(self, width: int | None) -> list[str]:
        """Return what a terminal shows of it, as it was when `news` was called last."""
        ...

    def closing(self) -> list[str]:
        """Return the lines to print at the end if the output goes to a file."""
        ...

    def ending(self) -> str | None:
        """Return in words how it has ended, or None while it goes on."""
        ...

    def page(self) -> str:
        """Return its report as an HTML document, which reloads while it goes on."""
        ...


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a comparison.")] = Path(
        "runs/latest"
    ),
    web: Annotated[
        bool, typer.Option("--web", help="Also serve the report on 127.0.0.1, which reloads.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of --web; 0 takes a free one.")
    ] = 0,
) -> None:
    """Follow a run until it ends: rounds, clients, budgets left and failures; Ctrl-C stops it.

    Of a comparison it shows which runs are done, at work and left. It reads the folder alone, so it
    neither disturbs a run nor asks a client.
    """
    console, watched = Console(), _opened(run, web)
    with ExitStack() as stack:
        if web:
            from fedlora_flwr.cli.watch_page import serving

            show_lines(console, [("Page", stack.enter_context(serving(watched.page, port)))])
        ending = _follow(console, watched)
    show_lines(console, [("Ended", ending)])


def _opened(folder: Path, web: bool) -> Watched:
    if (folder / "config.toml").is_file():
        from fedlora_flwr.cli.watch_screen import WatchedRun

        return WatchedRun(folder.resolve())
    if (folder / "settings.json").is_file():
        require("pandas", *(["scipy", "plots"] if web else []))
        from fedlora_flwr.cli.watch_comparison_screen import WatchedComparison

        return WatchedComparison(folder.resolve())
    allowed = "the folder of a run, with config.toml, or of a comparison, with settings.json"
    raise InvalidValue("RUN", str(folder), allowed)


def _follow(console: Console, watched: Watched) -> str:
    """Show it until it has ended; on a plain stream, one line per round or run."""
    width = console.width if console.is_terminal else None
    with ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            ending = watched.ending()  # Before the rows, so that none is missed.
            news = list(watched.news())
            for line in () if live else news:
                show_line(console, line)
            if live:
                live.update(Text("\n".join(watched.lines(width))), refresh=True)
            if ending is not None:
                break
            time.sleep(_INTERVAL)
    for line in () if live else watched.closing():
        show_line(console, line)
    return ending
