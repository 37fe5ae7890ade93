"""``python -m benchmarks [NAME…] [--json] [--output FILE] [--list]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.terminal import guard, show_json, show_lines

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Benchmarks; those with bars for simulations if none."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the benchmarks, and end.")] = False,
) -> None:
    """Measure speed and memory here, as ratios to what you would have otherwise."""
    from benchmarks.suite import BENCHMARKS, run_suite

    if listed:
        lines = [(name, (work.__doc__ or "").strip()) for name, work in BENCHMARKS.items()]
        show_lines(Console(), lines)
        return
    where = output and output.resolve()
    found = guard(lambda: run_suite(names or [], where, Console(stderr=as_json)))
    if as_json:
        show_json({name: [figure.as_dict() for figure in made] for name, made in found.items()})


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
