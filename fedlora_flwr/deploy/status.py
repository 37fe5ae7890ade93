"""How a fleet is: its server, its certificates, its current run, and each of its devices.

All of it is what the server has already: Flower's list of devices and runs, and the files of the
run's folder. No device is asked. What a device has spent is what it said in its last reply.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlora_flwr.deploy import ports
from fedlora_flwr.deploy.control import ONLINE, Control, Node, ServerRun, Untrusted
from fedlora_flwr.deploy.expiry import Expiry, expiries
from fedlora_flwr.deploy.fleet import read_fleet
from fedlora_flwr.deploy.server_process import SERVE
from fedlora_flwr.deploy.supernode import SCRIPT, arguments_of
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.report.facts import number
from fedlora_flwr.server.followed import Followed
from fedlora_flwr.server.report import facts_of
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.connection import SuperLinkError
from fedlora_flwr.strategies.identities import read_bindings
from fedlora_flwr.wire import EPSILON, EPSILON_BUDGET

UNREGISTERED, UNKNOWN = "not registered", "unknown"
"""States of a device whose key the server does not have, and of one of which it says nothing."""


@dataclass(frozen=True)
class Place:
    """Where a fleet's server is, as the operator's machine or the server itself knows it.

    Parameters
    ----------
    server : Path
        The server's folder.
    control : Control
        Where it answers.
    names : Sequence[str]
        The devices that the fleet was made with; empty on the server, which has no list.
    """

    server: Path
    control: Control
    names: Sequence[str]

    @classmethod
    def of(cls, folder: Path) -> Place:
        """Read the place from a fleet's folder, or from its folder ``server`` on the server.

        Raises
        ------
        InvalidValue
            It is neither of them.
        """
        if not (folder / "server.pem").exists():
            fleet, _ = read_fleet(folder)
            control = Control(f"{fleet.host}:{fleet.port}", folder / "operator" / "ca.pem")
            return cls(folder / "server", control, fleet.names)
        place = ports.asked(arguments_of(folder / SCRIPT, SERVE), os.environ)
        if place is None:
            raise InvalidValue("--port", "", f"a number, in {folder / SCRIPT}")
        # The certificate is valid for this machine's loopback, too.
        return cls(folder, Control(f"127.0.0.1:{place[1]}", folder / "ca.pem"), ())


@dataclass(frozen=True)
class Progress:
    """What a run's folder says of the run.

    Parameters
    ----------
    folder : Path
        The folder.
    metric : str
        The task's metric.
    num_rounds : int
        Rounds of the run.
    followed : Followed
        Its rows, which have been read.
    ending : str, optional
        How it has ended; None while it goes on.
    """

    folder: Path
    metric: str
    num_rounds: int
    followed: Followed
    ending: str | None

    @classmethod
    def of(cls, folder: Path) -> Progress:
        """Read a run's folder.

        Raises
        ------
        InvalidValue
            It is not the folder of a run.
        """
        if not (folder / "config.toml").is_file():
            raise InvalidValue("--run", str(folder), "the folder of a run, with config.toml")
        run_dir = RunDirectory(folder.resolve())
        facts, followed = facts_of(run_dir), Followed(run_dir)
        followed.new_rounds()
        rounds = facts.config.num_rounds
        return cls(folder, facts.metric, rounds, followed, run_dir.ending())

    @property
    def last(self) -> RoundRow | None:
        """The row of the last round that has ended."""
        return self.followed.last


@dataclass(frozen=True)
class DeviceStatus:
    """One device.

    Parameters
    ----------
    name : str
        The name under which it is registered.
    client : str
        The name under which it replies, as a run's files have it.
    state : str
        ``"online"``, ``"offline"``, ``"registered"`` (it has never connected), or one of
        `UNREGISTERED` and `UNKNOWN`.
    seen : datetime, optional
        When it was connected last.
    round : int, optional
        The last round in which its reply counted.
    epsilon, epsilon_budget : float, optional
        What it said in that reply of its spent and of its whole budget.
    declined : int, optional
        The round since which its budget does not hold the run.
    failures : int
        Its failures in this run.
    """

    name: str
    client: str
    state: str
    seen: datetime | None = None
    round: int | None = None
    epsilon: float | None = None
    epsilon_budget: float | None = None
    declined: int | None = None
    failures: int = 0

    @property
    def budget_left(self) -> float | None:
        """What is left of its budget, if it has said so."""
        if self.epsilon is None or self.epsilon_budget is None:
            return None
        return self.epsilon_budget - self.epsilon


@dataclass(frozen=True)
class FleetStatus:
    """How a fleet is.

    Parameters
    ----------
    address : str
        Host and port of the server.
    problem : str
        Why the server could not be asked, and what to do; empty if it was.
    certificates : Sequence[Expiry]
        The server's certificates.
    run : ServerRun, optional
        The run at work, or the last one.
    others : int
        Further runs that have not ended.
    progress : Progress, optional
        What the run's folder says, where this machine can read it.
    devices : Sequence[DeviceStatus]
        All devices, by name.
    """

    address: str
    problem: str
    certificates: Sequence[Expiry]
    run: ServerRun | None = None
    others: int = 0
    progress: Progress | None = None
    devices: Sequence[DeviceStatus] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        """Return what ``fedlora deploy status --json`` prints."""
        return {
            "server": {"address": self.address, "problem": self.problem or None},
            "certificates": [
                {
                    "subject": one.subject, "ends": one.end.isoformat(),
                    "good": one.finding.good, "fix": one.fix,
                }
                for one in self.certificates
            ],
            "run": self._run(),
            "devices": [
                {
                    **vars(device),
                    "seen": device.seen and device.seen.isoformat(),
                    "budget_left": device.budget_left,
                }
                for device in self.devices
            ],
        }  # fmt: skip

    def _run(self) -> dict[str, Any] | None:
        if self.run is None and self.progress is None:
            return None
        told = {"id": None, "status": None, "details": None, "folder": None}
        found: dict[str, Any] = {**told, **(vars(self.run) if self.run else {})}
        found["others"] = self.others
        if self.progress is None:
            return {**found, "round": None, "num_rounds": None, "metric": None, "value": None,
                    "failures": None, "ended": None}  # fmt: skip
        last, metric = dict(self.progress.last or {}), self.progress.metric
        return {
            **found,
            "folder": str(self.progress.folder),
            "round": last.get("round"),
            "num_rounds": self.progress.num_rounds,
            "metric": metric,
            "value": last.get(metric),
            "failures": self.progress.followed.failed,
            "ended": self.progress.ending,
        }


def fleet_status(folder: Path, run: Path | None = None) -> FleetStatus:
    """Look how a fleet is.

    Parameters
    ----------
    folder : Path
        The fleet's folder, or on the server the folder ``server``.
    run : Path, optional
        The folder of the run to look at. By default it is the folder that the server's run names,
        if this machine can read it.

    Raises
    ------
    InvalidValue
        One of the folders is something else.
    """
    place = Place.of(folder)
    problem, nodes, runs = _asked(place.control, folder)
    current = next((one for one in runs if not one.ended), next(iter(runs), None))
    others = sum(not one.ended for one in runs if one is not current)
    progress = _progress(run, current)
    address = "" if problem else place.control.address
    return FleetStatus(
        address=place.control.address,
        problem=problem,
        certificates=list(expiries(place.server, str(folder), address)),
        run=current,
        others=others,
        progress=progress,
        devices=list(_devices(place, None if problem else nodes, progress)),
    )


def _progress(run: Path | None, current: ServerRun | None) -> Progress | None:
    """Read the folder that the user names, or that the server's run names if it is here."""
    if run is not None:
        return Progress.of(run)
    # The run may write on another machine, so its folder need not be here.
    with suppress(OSError, InvalidValue):
        return Progress.of(Path(current.folder)) if current and current.folder else None
    return None


def _asked(control: Control, folder: Path) -> tuple[str, list[Node], list[ServerRun]]:
    """Ask the server for devices and runs; if it cannot be asked, say why and what to do."""
    try:
        if control.answers():
            return "", control.nodes(), control.runs()
    except Untrusted as error:
        return f"{error} `fedlora deploy check {folder}` says what to do.", [], []
    except SuperLinkError as error:
        return str(error), [], []
    silent = (
        f"No SuperLink answers at {control.address}. Run start.sh in the server's folder, or "
        "`systemctl start fedlora-superlink` there, and see that this machine may reach its port."
    )
    return silent, [], []


def _devices(
    place: Place, nodes: Sequence[Node] | None, progress: Progress | None
) -> Iterator[DeviceStatus]:
    """Yield each device that the fleet was made with, the server knows, or the run has heard."""
    bound: dict[str, str] = {}
    # This file has the names under which devices reply. Without it, registered names are shown.
    with suppress(InvalidValue, OSError):
        bound = {key: name for name, key in read_bindings(place.server / "identities.json").items()}
    # A device that got a new key may have an old one under the same name, which never comes back.
    known = {node.name: node for node in sorted(nodes or (), key=_freshness)}
    clients = {name: bound.get(node.key, name) for name, node in known.items()}
    followed = progress.followed if progress else None
    heard = {*followed.clients, *followed.declined} if followed else set()
    rest = {*place.names, *heard} - known.keys() - set(clients.values())
    for name in sorted(known.keys() | rest):
        node, client = known.get(name), clients.get(name, name)
        absent = UNREGISTERED if nodes is not None and name in place.names else UNKNOWN
        state, seen = (node.state, node.seen) if node else (absent, None)
        told = _told(followed, name, client) if followed else {}
        yield DeviceStatus(name, client, state, seen, **told)


def _freshness(node: Node) -> tuple[bool, float]:
    return node.state == ONLINE, node.seen.timestamp() if node.seen else 0.0


def _told(followed: Followed, name: str, client: str) -> dict[str, Any]:
    """Return what a run's files say of a device."""
    row = followed.clients[client].row if client in followed.clients else {}
    return {
        "round": row.get("round"),
        "epsilon": number(row.get(EPSILON)),
        "epsilon_budget": number(row.get(EPSILON_BUDGET)),
        "declined": followed.declined.get(client),
        # A device that has not replied yet is called by the name that the operator gave it.
        "failures": sum(followed.failed_by[one] for one in {name, client}),
    }
