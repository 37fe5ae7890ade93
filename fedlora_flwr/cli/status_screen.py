"""What ``fedlora deploy status`` shows of a fleet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from fedlora_flwr.cli.watch_screen import plain
from fedlora_flwr.deploy.status import DeviceStatus, FleetStatus
from fedlora_flwr.report.scales import duration
from fedlora_flwr.server.rounds import describe_round
from fedlora_flwr.terminal import Table

HEADS = ("device", "state", "last seen", "last reply", "ε spent", "budget left", "failures")


def facts(status: FleetStatus) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of server, certificates and run, each with its name."""
    how = "could not be asked" if status.problem else "answers"
    yield "Server", f"{how} at {status.address}"
    for one in status.certificates:
        found = one.finding
        rest = "" if found.good else f". To fix it: {found.fix}"
        yield "Valid", f"{found.subject}: {found.text}{rest}"
    for name, text in _run(status):
        yield name, plain(text)


def _run(status: FleetStatus) -> Iterator[tuple[str, str]]:
    run, progress = status.run, status.progress
    if run:
        details = f" ({run.details})" if run.details else ""
        yield "Run", f"{run.id}, {run.status}{details}"
    elif not status.problem:
        yield "Run", "none yet"
    if status.others:
        yield "Others", f"{status.others} more that have not ended"
    if progress:
        last = progress.last
        done = f"{last['round'] if last else 0} of {progress.num_rounds}"
        rest = f": {describe_round(last, progress.metric)}" if last else ""
        yield "Round", done + rest
        if progress.ending is not None:
            yield "Ended", progress.ending
        yield "Folder", str(progress.folder)
    elif run:
        where = f"in {run.folder}" if run.folder else "in the data folder"
        yield (
            "Folder",
            (
                f"{where} on the server, and not readable here. For rounds and budgets, run this "
                "command on the server, or name a copy of the folder with --run"
            ),
        )


def devices_table(status: FleetStatus) -> Table:
    """Return a row per device."""
    rows = [
        (
            plain(_named(one)), one.state, _seen(one), _reply(one), _figure(one.epsilon),
            "0 for this run" if one.declined is not None else _figure(one.budget_left),
            str(one.failures) if status.progress else "–",
        )
        for one in status.devices
    ]  # fmt: skip
    return Table(HEADS, rows, "<<<<>>>")


def _named(device: DeviceStatus) -> str:
    own = device.client == device.name
    return device.name if own else f"{device.name} ({device.client})"


def _seen(device: DeviceStatus) -> str:
    if device.state == "online":
        return "now"
    if device.seen is None:
        return "–"
    return f"{duration(max(0.0, (datetime.now(UTC) - device.seen).total_seconds()))} ago"


def _reply(device: DeviceStatus) -> str:
    if device.declined is not None:
        return f"declined in round {device.declined}"
    return "–" if device.round is None else f"round {device.round}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
