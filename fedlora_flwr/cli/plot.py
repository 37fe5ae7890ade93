"""``fedlora plot``: a picture of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import named_file
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.terminal import show_lines


def plot(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("runs/latest"),
    output: Annotated[
        Path | None,
        typer.Option(help="The plot, a PNG file; RUN_DIR/rounds.png if not given."),
    ] = None,
) -> None:
    """Draw a run round by round: its metric, how far uploads agree, and what their mean loses."""
    if not (run_dir / "rounds.jsonl").is_file():
        raise InvalidValue("RUN_DIR", str(run_dir), "the folder of a run, with rounds.jsonl")
    path = named_file(output or run_dir / "rounds.png", "a .png")
    require("plots")
    from fedlora_flwr.server.run_result import RunResult

    RunResult.load(run_dir).plot(path)
    show_lines(Console(), [("Plot", str(path))])
