"""``fedlora report``: a run, or several runs compared, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.terminal import show_lines

_RUNS = "the folder of a run, with config.toml and rounds.jsonl"


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs; runs/latest if none is given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The report, an HTML file; RUN/report.html, or report.html for several runs.",
        ),
    ] = None,
) -> None:
    """Write what a run has done as one HTML file; several runs are compared over their seeds."""
    folders = runs or [Path("runs/latest")]
    for folder in folders:
        if not all((folder / name).is_file() for name in ("config.toml", "rounds.jsonl")):
            raise InvalidValue("RUN", str(folder), _RUNS)
    several = len(folders) > 1
    path = html_file(output or (Path("report.html") if several else folders[0] / "report.html"))
    if several:
        require("scipy")
    from fedlora_flwr.files import replace_file
    from fedlora_flwr.report.page import run_report, runs_report
    from fedlora_flwr.server.report import facts_of
    from fedlora_flwr.server.run_dir import RunDirectory

    facts = [facts_of(RunDirectory(folder)) for folder in folders]
    replace_file(path, (runs_report(facts) if several else run_report(facts[0])).encode())
    show_lines(Console(), [("Report", str(path))])


def html_file(path: Path) -> Path:
    """Return the resolved path for a report.

    Raises
    ------
    InvalidValue
        The path is not that of an HTML file, or its folder does not exist.
    """
    path = path.resolve()
    if path.suffix.lower() != ".html" or not path.parent.is_dir():
        raise InvalidValue("--output", str(path), "an .html file in a folder that exists")
    return path
