"""``fedlora deploy``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson, Overrides, complete_recipe
from fedlora_flwr.cli.convert import read_recipe
from fedlora_flwr.environment import own_program
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.operating_system import WINDOWS
from fedlora_flwr.processes import uncollected
from fedlora_flwr.terminal import Commands, show, show_json, show_line, show_lines

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Train on real devices.")


@app.callback()
def _needs_another_system() -> None:
    if WINDOWS:
        raise FedLoRAError("Windows has no deployment. Use Linux or macOS for it.")


Folder = Annotated[Path, typer.Argument(help="The fleet's folder.")]


@app.command()
def init(
    folder: Folder,
    devices: Annotated[int, typer.Option(help="Number of devices.")],
    host: Annotated[
        str, typer.Option(help="Name or address under which devices reach the server.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.")] = 9443,
    days: Annotated[
        int,
        typer.Option(
            help="Days for which the server's certificate is valid; the CA's is ten years."
        ),
    ] = 365,
    recipe: Annotated[
        str,
        typer.Option(
            help="A recipe whose task, model, classes and columns go into each device.toml.",
            autocompletion=complete_recipe,
        ),
    ] = "",
) -> None:
    """Write certificates, keys, start scripts, systemd units and settings of a small fleet."""
    from fedlora_flwr.deploy.fleet import CONNECTION, Fleet, make_fleet

    run = read_recipe(recipe, None) if recipe else None
    make_fleet(folder, Fleet(devices, host, port, days), run)
    app_folder = folder / "operator" / "app"
    lines = [
        ("Fleet", f"{folder}: a server and {devices} devices; private keys have mode 600"),
        ("Server", "carry server/ to the server, run start.sh; keep ca/ca.key in a safe place"),
        ("Devices", "carry devices/NAME/ to each device, fill in device.toml, run start.sh"),
        ("Operator", "add operator/connection.toml to ~/.flwr/config.toml, run register.sh,"),
        ("", f"then: {own_program('flwr')} run {app_folder} {CONNECTION} --run-config RECIPE.toml"),
        ("Check", f"{own_program('fedlora')} deploy check {folder} --recipe RECIPE.toml"),
    ]
    console = Console()
    for name, text in lines:  # Only the terminal wraps lines, so commands can be copied.
        show_line(console, f"{name:<9} {text}")


@app.command()
def check(
    folder: Annotated[
        Path, typer.Argument(help="The fleet's folder or, on a device, the device's folder.")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help="The planned run. With it, records, budgets and models are checked, too.",
            autocompletion=complete_recipe,
        ),
    ] = "",
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", help="On a device, first list each key with its value, or who gives it."
        ),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that can be known before a fleet or a device starts, one line each."""
    with uncollected():
        from fedlora_flwr.deploy.check import check_device, check_fleet, keys_in_force
    from fedlora_flwr.deploy.fleet import SETTINGS

    on_device = (folder / SETTINGS).exists()
    if keys and not on_device:
        raise InvalidValue("--keys", str(folder), f"the folder of a device, with {SETTINGS}")
    folder, look = folder.resolve(), check_device if on_device else check_fleet
    run = read_recipe(recipe, overrides) if recipe else None
    console, found = Console(), []
    # The list is long and comes first, so that problems are still on the screen at the end.
    for finding in chain(keys_in_force(folder) if keys else (), look(folder, run)):
        found.append(finding)
        if not as_json:
            mark = "ok  " if finding.good else "FAIL"
            show_line(console, f"{mark} {finding.subject}: {finding.text}")
            if not finding.good:
                show_line(console, f"     → {finding.fix}")
    if as_json:
        show_json([asdict(finding) for finding in found])
    if bad := sum(not finding.good for finding in found):
        raise FedLoRAError(f"{bad} {'problem' if bad == 1 else 'problems'} to fix first.")


@app.command()
def status(
    folder: Annotated[
        Path,
        typer.Argument(help="The fleet's folder or, on the server, the folder server."),
    ],
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run to show, in place of the one that the server names."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show devices, their budgets left, the current run and the certificates; asks no device.

    Budgets are what each device's last reply in the run said. Exits with code 1 if the server
    cannot be asked.
    """
    with uncollected():
        from fedlora_flwr.cli.status_screen import devices_table, facts
        from fedlora_flwr.deploy.status import fleet_status

    found = fleet_status(folder.resolve(), run)
    if as_json:
        show_json(found.as_json())
    else:
        console = Console()
        show_lines(console, facts(found))
        show_line(console, "")
        show(console, devices_table(found))
    if found.problem:
        raise FedLoRAError(found.problem)


@app.command()
def renew(
    folder: Folder,
    days: Annotated[int, typer.Option(help="Days for which the certificate is valid.")] = 365,
) -> None:
    """Sign a new certificate for a fleet's server. Nothing changes on devices."""
    from fedlora_flwr.deploy.fleet import read_fleet
    from fedlora_flwr.deploy.identities import renew_server

    fleet, _ = read_fleet(folder)
    server = folder / "server"
    end = renew_server(server, folder / "ca", fleet.host, days)
    console = Console()
    show_line(console, f"Server    the new certificate is valid until {end:%Y-%m-%d}")
    show_line(console, f"Carry     server.pem and server.key of {server} to the server; restart it")


@app.command()
def run(
    folder: Folder,
    recipe: Annotated[
        str,
        typer.Argument(
            help="The run; its run-dir is a folder on the server.", autocompletion=complete_recipe
        ),
    ],
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="The server's folder of a run, to continue after its last round.")
    ] = "",
    server: Annotated[
        bool, typer.Option("--server", help="Also start the fleet's server here, and end it after.")
    ] = False,
    restarts: Annotated[
        int, typer.Option(help="Restarts that are allowed within --within minutes.")
    ] = 10,
    within: Annotated[float, typer.Option(help="Minutes in which restarts are counted.")] = 60.0,
    pause: Annotated[
        float, typer.Option(help="Seconds before the first restart; they double, up to 300.")
    ] = 5.0,
) -> None:
    """Run a recipe on a fleet to its end; a run or server that dies is started again."""
    from fedlora_flwr.deploy.supervise import Restarts, supervise

    config = read_recipe(recipe, [*(overrides or []), *([f"resume={resume}"] if resume else [])])
    console = Console()
    limits = Restarts(restarts, within * 60, pause)
    supervise(folder, config, limits, lambda line: show_line(console, line), server=server)
    where = config.resume or config.run_dir
    show_line(console, f"The run has completed. Its results are on the server, in {where}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start(context: typer.Context) -> None:
    """Start a SuperNode that runs installed code only; a device's start.sh calls this."""
    with uncollected():
        from fedlora_flwr.clients.device import Device
        from fedlora_flwr.deploy.device_check import require_in_place
        from fedlora_flwr.deploy.fleet import SETTINGS
        from fedlora_flwr.deploy.supernode import start_supernode

    device, file = None, Path.cwd() / SETTINGS
    with suppress(InvalidValue):  # What is wrong with this file, each message's answer says.
        device = Device.read(file)
        device.require()
    if device:
        require_in_place(device, file)
    start_supernode(Path.cwd(), context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Start a fleet's SuperLink; the server's start.sh calls this."""
    from fedlora_flwr.deploy import server_process

    server_process.serve(context.args)


@app.command()
def identity(
    device: Annotated[Path, typer.Argument(help="A device's file, device.toml.")],
) -> None:
    """Print the identity by which other devices know this device in a secure sum."""
    from fedlora_flwr.clients.device import Device
    from fedlora_flwr.clients.sum_store import SUMS, SumStore
    from fedlora_flwr.config import RunConfig
    from fedlora_flwr.config.state import state_folder

    found = Device.read(device)
    folder = state_folder(RunConfig(state_dir=str(found.settings.get("state-dir", ""))))
    typer.echo(f"{SumStore(folder / SUMS).public_identity()} {found.client}")
