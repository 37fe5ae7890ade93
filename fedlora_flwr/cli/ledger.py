"""``fedlora ledger``: what has been spent, by a ledger's file alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedlora_flwr.cli.arguments import AsJson
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.errors import InvalidValue, require
from fedlora_flwr.files import data_folder
from fedlora_flwr.terminal import Table, show, show_json, show_lines

if TYPE_CHECKING:
    from fedlora_flwr.clients.device import Device
    from fedlora_flwr.privacy.account import Account
    from fedlora_flwr.privacy.spent import Spent

_LATEST = Path("runs/latest")
_NOT_YET = ", which the first round makes"


def ledger(
    place: Annotated[
        Path | None,
        typer.Argument(
            help="Where the ledger is: the file ledger.sqlite, or the folder that holds it, such "
            "as a run's folder or a project's state-dir; or a device's folder, whose device.toml "
            "says where. By default the ledger of this user, or else that of runs/latest."
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="δ at which ε is given; by default that of device.toml, or of the config.toml "
            "beside the ledger, or 1e-3."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each run has spent of each client's data; nothing but the ledger is needed."""
    require("client")
    from fedlora_flwr.privacy.ledger import Ledger
    from fedlora_flwr.privacy.spent import spent

    file, device = _found(place or _own())
    at, source = (delta, "") if delta is not None else _delta(file, device)
    begun = device is None or Ledger.exists(file)
    account = _account(device, at) if device else None
    found = spent(file, at, account) if begun else []
    if as_json:
        show_json([asdict(entry) for entry in found])
        return
    console = Console()
    if begun:
        show(console, _table(found))
    lines = _budget(account, found) if account else []
    lines += [("δ", f"{at:g}{source}"), ("Ledger", f"{file}{'' if begun else _NOT_YET}")]
    show_lines(console, lines)


def _own() -> Path:
    """Return the folder of this user's ledger, or that of the last run if only it has one."""
    from fedlora_flwr.privacy.ledger import LEDGER

    folder = data_folder()
    return _LATEST if not (folder / LEDGER).exists() and (_LATEST / LEDGER).exists() else folder


def _delta(file: Path, device: Device | None) -> tuple[float, str]:
    """Return the δ at which ε is given, and words on who says so."""
    if device is not None and "delta" in device.settings:
        return float(device.settings["delta"]), ", says device.toml"
    config = file.parent / "config.toml"
    if device is None and config.is_file():
        return load_recipe(str(config)).delta, ", says config.toml beside the ledger"
    return RunConfig.delta, ", the default; give the δ of the client's budget with --delta"


def _found(place: Path) -> tuple[Path, Device | None]:
    """Return the ledger's file, and a device where its folder was named."""
    from fedlora_flwr.deploy.fleet import SETTINGS
    from fedlora_flwr.privacy.ledger import LEDGER

    device = None
    folder = place.parent if place.name == SETTINGS else place
    if (folder / SETTINGS).is_file():
        from fedlora_flwr.clients.device import Device

        device = Device.read(folder / SETTINGS)
        place = folder / Path(str(device.settings.get("state-dir") or data_folder())).expanduser()
        place = place / LEDGER
    elif place.is_dir():
        place = place / LEDGER
    if device is None and not place.exists():
        allowed = (
            "a ledger's file, or a folder with one: nothing is spent where there is none. A "
            "simulation keeps its ledger in its run folder: `fedlora ledger runs/latest`"
        )
        raise InvalidValue("ledger", str(place), allowed)
    return place.resolve(), device


def _account(device: Device, delta: float) -> Account:
    """Return a device's budget over all its runs."""
    from fedlora_flwr.privacy.ledger import Account

    return replace(Account.of(device.config({}), device.client, ""), delta=delta)


def _budget(account: Account, found: list[Spent]) -> list[tuple[str, str]]:
    """Return the lines on a device's budget, and what is left of it over all its runs."""
    each = ", for each run" if account.scope == "run" else ""
    lines = [("Budget", f"ε ≤ {account.epsilon:g}, says device.toml{each}")]
    own = [entry for entry in found if entry.client == account.client and not entry.run]
    if account.scope == "run" or not own:
        return lines if found else [("Spent", "Nothing spent yet."), *lines]
    (whole,) = own
    left = max(0.0, account.epsilon - whole.epsilon)
    text = f"{whole.epsilon:.2f} of {account.epsilon:g} ({whole.accountant}); left {left:.2f}"
    return [("Spent", text), *lines]


def _table(found: list[Spent]) -> Table:
    whole = any(not entry.run for entry in found)
    runs = {entry.client: 0 for entry in found}
    for entry in found:
        runs[entry.client] += bool(entry.run)
    heads = ["client", "run", "rounds", "steps", "σ", "q", "ε of the run alone"]
    heads += ["ε of all runs", "accountant"] if whole else []
    rows = []
    for entry in found:
        epsilon = f"{entry.epsilon:.3f}"
        row = [
            entry.client,
            entry.run or f"all {runs[entry.client]}",
            f"{entry.rounds:,}",
            f"{entry.steps:,}",
            f"{entry.noise_multiplier:.3f}",
            f"{entry.sample_rate:.5f}",
            epsilon if entry.run else "",
        ]
        row += ["" if entry.run else epsilon, entry.accountant] if whole else []
        rows.append([*row, entry.unit, entry.last])
    return Table([*heads, "for each", "last"], rows, "<<>>>>>><<<" if whole else "<<>>>>><<")
