"""``fedlora ledger``: what has been spent, by a ledger's file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.files import data_folder
from fedlora_flwr.terminal import Table, show, show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.privacy.spent import Spent


def ledger(
    place: Annotated[
        Path | None,
        typer.Argument(
            help="A ledger's file; or the folder of a run, of a state-dir or of a device, whose "
            "device.toml says where the ledger is. By default that of this user."
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="δ at which ε is given; by default that of device.toml, or 1e-5."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each run has spent of each client's data; nothing but the ledger is needed."""
    require("client")
    from fedlora_flwr.privacy.spent import spent

    file, settings = _found(place or data_folder())
    at = delta if delta is not None else float(settings.get("delta", RunConfig.delta))
    found = spent(file, at)
    if as_json:
        show_json([asdict(entry) for entry in found])
        return
    console = Console()
    show(console, _table(found))
    lines = [("δ", f"{at:g}"), ("Ledger", str(file))]
    if "epsilon" in settings:
        lines.insert(0, ("Budget", f"ε ≤ {float(settings['epsilon']):g}, says device.toml"))
    show_lines(console, lines)


def _found(place: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the ledger's file, and a device's own settings where its folder was named."""
    from fedlora_flwr.deploy.fleet import SETTINGS
    from fedlora_flwr.privacy.ledger import LEDGER

    settings: Mapping[str, Any] = {}
    folder = place.parent if place.name == SETTINGS else place
    if (folder / SETTINGS).is_file():
        from fedlora_flwr.clients.device import Device

        settings = Device.read(folder / SETTINGS).settings
        place = folder / Path(str(settings.get("state-dir") or data_folder())).expanduser()
    if place.is_dir():
        place = place / LEDGER
    if not place.exists():
        allowed = "a ledger's file, or a folder with one: nothing is spent where there is none"
        raise InvalidValue("ledger", str(place), allowed)
    return place.resolve(), settings


def _table(found: list[Spent]) -> Table:
    heads = ("client", "run", "rounds", "steps", "σ", "q", "ε", "for each", "last")
    runs = {entry.client: sum(e.client == entry.client for e in found) - 1 for entry in found}
    rows = [
        (
            entry.client,
            entry.run or f"all {runs[entry.client]}",
            f"{entry.rounds:,}",
            f"{entry.steps:,}",
            f"{entry.noise_multiplier:.3f}",
            f"{entry.sample_rate:.5f}",
            f"{entry.epsilon:.3f}",
            entry.unit,
            entry.last,
        )
        for entry in found
    ]
    return Table(heads, rows, "<<>>>>><<")
