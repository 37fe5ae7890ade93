"""The ``fedlora`` command: one file per group of commands, put together here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli import (
    adapters,
    audit,
    compare,
    convert,
    deploy,
    explain,
    forecast,
    ledger,
    plot,
    pretrain,
    report,
    run,
    watch,
)
from fedlora_flwr.environment import versions
from fedlora_flwr.operating_system import untested
from fedlora_flwr.terminal import Commands, show_line

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},  # This also applies to all commands.
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differentially private federated LoRA on Flower.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedlora-flwr {versions()['fedlora-flwr']}")
        raise typer.Exit


@app.callback()
def fedlora(
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Differentially private federated LoRA on Flower."""
    if sentence := untested():
        show_line(Console(stderr=True), sentence)


app.command()(run.run)
app.command()(run.simulate)
app.command()(compare.compare)
app.command()(audit.audit)
app.command()(forecast.budget)
app.command()(forecast.plan)
app.command("inspect-split")(forecast.inspect_split)
app.command()(ledger.ledger)
app.command()(plot.plot)
app.command()(adapters.evaluate)
app.command()(adapters.sharpness)
app.command()(adapters.predict)
app.command()(adapters.merge)
app.command()(report.report)
app.command()(watch.watch)
app.command()(explain.recipes)
app.command()(explain.keys)
app.command()(convert.convert)
app.command()(pretrain.pretrain)
app.add_typer(deploy.app, name="deploy")

__all__ = ["app"]
