"""``fedlora report``: a run, several runs or a comparison, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import named_file
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.terminal import show_lines

_RUN = "the folder of a run, with config.toml and rounds.jsonl"
_ROWS = "rows.csv"


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, or the folder of a comparison; runs/latest if none is given.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The report, an HTML file; report.html in the folder, or here for several runs.",
        ),
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Leave out clients, split and paths; writes report-public.html."
        ),
    ] = False,
) -> None:
    """Write what a run has done as one HTML file; several runs are compared over their seeds.

    RUN is the folder of a run, or of a comparison; runs/latest if none is given.
    """
    folders = runs or [Path("runs/latest")]
    study = len(folders) == 1 and (folders[0] / _ROWS).is_file()
    for folder in () if study else folders:
        if not all((folder / name).is_file() for name in ("config.toml", "rounds.jsonl")):
            raise InvalidValue("RUN", str(folder), _RUN)
    single = len(folders) == 1
    if public and (study or not single):
        raise InvalidValue("--public", True, "the folder of one run")
    name = "report-public.html" if public else "report.html"
    default = (folders[0] if single else Path()) / name
    path = named_file(output or default, "an .html")
    from fedlora_flwr.files import replace_file

    page = _study(folders[0]) if study else _runs(folders, public)
    replace_file(path, page.encode())
    show_lines(Console(), [("Report", str(path))])


def _runs(folders: Sequence[Path], public: bool) -> str:
    """Return the report of one run, or of several."""
    if len(folders) > 1:
        require("scipy")
    from fedlora_flwr.report.page import run_report, runs_report
    from fedlora_flwr.server.report import facts_of
    from fedlora_flwr.server.run_dir import RunDirectory

    facts = [facts_of(RunDirectory(folder)) for folder in folders]
    if public:
        facts = [run.for_others() for run in facts]
    return runs_report(facts) if len(facts) > 1 else run_report(facts[0])


def _study(folder: Path) -> str:
    """Return the report of a comparison."""
    require("scipy", "plots")
    from fedlora_flwr.studies.progress import study_page

    return study_page(folder)
