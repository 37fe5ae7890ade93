"""``fedlora deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.recipes import load_recipe
from fedlora_flwr.terminal import guard

app = typer.Typer(no_args_is_help=True, help="Real clients on real devices.")
Folder = Annotated[Path, typer.Argument(help="The fleet's folder.")]


@app.command()
def init(
    folder: Folder,
    devices: Annotated[int, typer.Option(help="Number of devices.")],
    host: Annotated[
        str, typer.Option(help="Name or address under which devices reach the server.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.")] = 9443,
    days: Annotated[int, typer.Option(help="How long the certificates hold.")] = 365,
    recipe: Annotated[
        str, typer.Option(help="A run: device.toml takes its task, model, classes and columns.")
    ] = "",
) -> None:
    """Write certificates, keys, start scripts, units and settings of a small fleet."""

    def work() -> None:
        from fedlora_flwr.deploy.fleet import CONNECTION, Fleet, make_fleet

        run = load_recipe(recipe, None) if recipe else None
        make_fleet(folder, Fleet(devices, host, port, days), run)
        say = Console(highlight=False, soft_wrap=True).print
        say(f"Fleet     {folder}: a server and {devices} devices; private keys have mode 600")
        say("Server    carry server/ there, run start.sh; ca/ca.key belongs into a safe")
        say("Devices   carry devices/NAME/ there, fill in device.toml, run start.sh")
        say("Operator  add operator/connection.toml to ~/.flwr/config.toml, run register.sh,")
        app = folder / "operator" / "app"
        say(f"          then: flwr run {app} {CONNECTION} --run-config RECIPE.toml")
        say(f"Check     fedlora deploy check {folder} --recipe RECIPE.toml")

    guard(work)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The fleet's folder, or on a device its own.")],
    recipe: Annotated[
        str, typer.Option(help="The planned run: records, budgets and models are looked at, too.")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("-c", help="key=value, in force over the recipe.")
    ] = None,
) -> None:
    """Look at everything that can be known before a fleet, or a device, starts; one line each."""

    def work() -> None:
        from fedlora_flwr.deploy.check import check_device, check_fleet
        from fedlora_flwr.deploy.fleet import SETTINGS

        look = check_device if (folder / SETTINGS).exists() else check_fleet
        run = load_recipe(recipe, overrides) if recipe else None
        console, bad = Console(highlight=False, soft_wrap=True), 0
        for finding in look(folder.resolve(), run):
            mark = "ok  " if finding.good else "MEND"
            end = "" if finding.good else f"\n     → {finding.mend}"
            console.print(f"{mark} {finding.subject}: {finding.text}{end}", markup=False)
            bad += not finding.good
        if bad:
            raise FedLoRAError(f"{bad} to mend first.")

    guard(work)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start(context: typer.Context) -> None:
    """Start a SuperNode that runs installed code only; a device's start.sh does it."""

    def work() -> None:
        from fedlora_flwr.deploy.supernode import start_supernode

        start_supernode(Path.cwd(), context.args)

    guard(work)
