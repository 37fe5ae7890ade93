"""The folder of a small fleet: one for the server, one per device, one for the operator."""

from __future__ import annotations

import ipaddress
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from fedlora_flwr.clients.sum_store import SUMS, SumStore
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.toml import toml_value
from fedlora_flwr.deploy.identities import make_certificates, make_device_key
from fedlora_flwr.deploy.server_process import SERVE
from fedlora_flwr.deploy.supernode import SCRIPT, START
from fedlora_flwr.environment import versions
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.files import SERVER_STATE, replacing
from fedlora_flwr.simulations.app import write_app
from fedlora_flwr.simulations.superlink import QUIET

CONNECTION = "fedlora-fleet"
MANIFEST, SETTINGS = "fleet.json", "device.toml"
_QUIET = "export " + " ".join(f"{k}={v}" for k, v in QUIET.items() if k.startswith("FLWR_"))

_SUPERLINK = f"""#!/bin/sh
# Starts Flower's SuperLink on $listen:$port. Runs, replies and registered keys are in state.sqlite.
set -eu
# Only this user may read the files that are written here, such as uploads and the database.
umask 077
cd "$$(dirname "$$0")"
{_QUIET}
# The record of which device has which key is kept here, for this fleet alone.
export {SERVER_STATE}="$$PWD"
exec {SERVE} --host $listen --port $port \\
    --ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key \\
    --enable-supernode-auth --database state.sqlite
"""
_SUPERNODE = f"""#!/bin/sh
# Starts this device's SuperNode, which connects to $host:$port and listens on loopback alone.
# Without `fedlora deploy start`, Flower would run the code that a server ships.
set -eu
# Only this user may read the files that are written here.
umask 077
cd "$$(dirname "$$0")"
{_QUIET}
exec {START} --superlink $host:$port --root-certificates ca.pem \\
    --auth-supernode-private-key device.key --port "$${{FEDLORA_NODE_PORT:-$node_port}}" \\
    --node-config "device=\\"$$PWD/device.toml\\""
"""
_UNIT = """[Unit]
Description=$title
After=network-online.target
Wants=network-online.target

[Service]
# The place of this folder on the machine, and the user who runs it.
WorkingDirectory=/opt/fedlora
Environment=PATH=/opt/fedlora/venv/bin:/usr/bin:/bin
ExecStart=/opt/fedlora/start.sh
User=fedlora
$why
Restart=always
RestartSec=10
NoNewPrivileges=true
ProtectSystem=full
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
_SERVER_ENDS = "# A server whose SuperExec was killed ends. Runs and registered keys are kept."
_NODE_ENDS = "# A SuperNode exits with code 0 when its server no longer admits it."
_SERVER_UNIT = {"title": "Flower SuperLink", "why": _SERVER_ENDS}
_NODE_UNIT = {"title": "Flower SuperNode", "why": _NODE_ENDS}
_DEVICE = """# What this device says about itself. A run says the rest, within limits.
# `fedlora keys --who-decides` lists who decides what, and `fedlora deploy check . --keys` lists
# what is in force.
client-id = "$name"

# The task that it takes part in. Task, model, classes and columns never come from a run.
$stated
# Its records: parquet, CSV, JSON lines or pictures.
dataset = "data"
$trust
# The budget of these n records, for all runs together. delta must be below 1/n. One run may plan
# for all of epsilon, unless run-epsilon sets a smaller share. Even then the first run may count
# for almost all of epsilon, most of all a short run with little noise. `fedlora deploy check` with
# the run's recipe says how much it is, and how many more runs like it fit.
epsilon = 3.0
delta = 1e-5
ledger-scope = "lifetime"
state-dir = "state"
# run-epsilon = 1.0

# A process keeps the model and the records in memory for so many seconds after a message, so that
# it can serve the next one at once. 0 keeps nothing.
keep-warm = 600

# device = "auto"
# client-threads = 1
# A run may evaluate on this device only if a split of public records is named here.
# test-split = "validation"
# This line lets a run weigh this device by its number of records. It tells the server that number.
# weighting = "size"

# Limits on what a run may ask of this device, if they should be narrower than the package's own.
# [limits]
# clip-norm = 10.0
# local-steps = [1, 100]
# precision = ["fp32"]
"""
_STATED = (
    "task", "model", "weights", "num-classes", "class-names", "input-columns", "label-column",
)  # fmt: skip
_TRUST = """
# The devices share the noise over a secure sum (docs/trust_models.md), and this device uploads in
# no other way. It takes part only with devices in peers.txt, and only if at least so many of them
# share the noise.
trust-model = "secure-sum"
peers = "peers.txt"
least-shares = 2
# The owner's estimate of how many of them may pass what they know to the server.
colluding = {colluding}
"""
_EXAMPLES = """# model = "model"
# num-classes = 2
# class-names = "negative,positive"
# input-columns = "sentence"
# label-column = "label"
"""
_CONNECTION = """# Append this to the operator's ~/.flwr/config.toml.
[superlink.$connection]
address = "$host:$port"
root-certificates = "$ca"
"""
_REGISTER = """#!/bin/sh
# Registers every device's public key with the running SuperLink; others are refused. Keys that are
# registered already stay so. registered.txt tells which node id is which device.
set -eu
cd "$$(dirname "$$0")"
failed=0
for key in keys/*.pub; do
    name="$$(basename "$$key" .pub)"
    if told="$$(flwr supernode register "$$key" $connection --name "$$name" 2>&1)"; then
        echo "$$told"
        echo "$$name: $$(echo $$told)" >> registered.txt
    elif echo "$$told" | grep -q "already in use"; then
        echo "$$name: its key is registered already, or was registered once and then removed"
    else
        echo "$$name: $$told" >&2
        failed=1
    fi
done
exit $$failed
"""


@dataclass(frozen=True)
class Fleet:
    """A server and its devices.

    Parameters
    ----------
    devices : int
        Number of devices.
    host : str
        Name or address under which devices reach the server.
    port : int
        The server's one port.
    days : int
        Days for which the server's certificate is valid.
    """

    devices: int
    host: str = "127.0.0.1"
    port: int = 9443
    days: int = 365

    def __post_init__(self) -> None:
        for key, value, least, most in (
            ("devices", self.devices, 1, 10_000),
            ("port", self.port, 1, 65_535),
            ("days", self.days, 1, 3_650),
        ):
            if not least <= value <= most:
                raise InvalidValue(key, value, f"a whole number from {least} to {most}")
        if not self.host or any(c.isspace() or c in "/:@\"'$`" for c in self.host):
            raise InvalidValue("host", self.host, "a name or an IPv4 address, without a port")

    @property
    def names(self) -> list[str]:
        """Names of the devices."""
        return [f"device-{number:02d}" for number in range(1, self.devices + 1)]

    @property
    def listen(self) -> str:
        """The address that the server listens on: loopback stays loopback."""
        try:
            local = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            local = self.host == "localhost"
        return "127.0.0.1" if local else "0.0.0.0"  # noqa: S104  # Devices come from outside.


def make_fleet(folder: Path, fleet: Fleet, run: RunConfig | None = None) -> None:
    """Write everything that a fleet needs, atomically.

    Parameters
    ----------
    folder : Path
        A folder that does not exist yet, or an empty one.
    fleet : Fleet
        The fleet to make.
    run : RunConfig, optional
        A run that the devices are for. Their files get its task, model, classes and columns, which
        their owners can read and change. By default the task is digits.

    Raises
    ------
    InvalidValue
        The folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValue("folder", str(folder), "an empty folder, or one that does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as draft:
        draft.mkdir(mode=0o700)
        try:
            _fill(draft, folder, fleet, run or RunConfig())
        except BaseException:
            shutil.rmtree(draft)
            raise


def read_fleet(folder: Path) -> tuple[Fleet, dict[str, str]]:
    """Return the fleet that a folder belongs to, and the versions that it was made with.

    Raises
    ------
    InvalidValue
        It is not a fleet's folder.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Fleet(**content["fleet"]), dict(content["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        allowed = f"a folder that `fedlora deploy init` made ({error})"
        raise InvalidValue("folder", str(folder), allowed) from error


def _fill(draft: Path, folder: Path, fleet: Fleet, run: RunConfig) -> None:
    server, operator = draft / "server", draft / "operator"
    # Each folder is copied to another machine with its mode, and others may use that machine.
    for made in (server, operator, operator / "keys", draft / "ca", draft / "devices"):
        made.mkdir(mode=0o700)
    make_certificates(server, fleet.host, fleet.days)
    # The CA's key signs the next certificate. The server does not need it.
    (server / "ca.key").rename(draft / "ca" / "ca.key")
    for place in (draft / "ca", operator):
        shutil.copy(server / "ca.pem", place / "ca.pem")
    values = {
        "host": fleet.host,
        "port": str(fleet.port),
        "listen": fleet.listen,
        "connection": CONNECTION,
        "ca": str((folder / "operator" / "ca.pem").resolve()),
    }
    _script(server / SCRIPT, _SUPERLINK, values)
    _text(server / "fedlora-superlink.service", _UNIT, _SERVER_UNIT)
    _text(operator / "connection.toml", _CONNECTION, values)
    _script(operator / "register.sh", _REGISTER, values)
    write_app(operator / "app", dict(run.own))
    trust = _TRUST.format(colluding=run.colluding) if run.secure_sum else ""
    identities = []
    for number, name in enumerate(fleet.names):
        device = draft / "devices" / name
        device.mkdir(mode=0o700)
        make_device_key(device, name)
        shutil.copy(device / "device.pub", operator / "keys" / f"{name}.pub")
        shutil.copy(server / "ca.pem", device / "ca.pem")
        _script(device / SCRIPT, _SUPERNODE, {**values, "node_port": str(9500 + number)})
        _text(device / "fedlora-supernode.service", _UNIT, _NODE_UNIT)
        _text(device / SETTINGS, _DEVICE, {"name": name, "stated": stated(run), "trust": trust})
        if run.secure_sum:
            identities.append(f"{SumStore(device / 'state' / SUMS).public_identity()} {name}\n")
    for name in fleet.names if run.secure_sum else ():
        (draft / "devices" / name / "peers.txt").write_text("".join(identities), encoding="utf-8")
    content = {"fleet": asdict(fleet), "versions": versions()}
    # The check of a device reads it.
    for place in (draft, *(draft / "devices" / name for name in fleet.names)):
        (place / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stated(run: RunConfig) -> str:
    """Return the lines of a device's file that a run suggests, or examples of them."""
    defaults, values = RunConfig().items(), run.items()
    lines = [
        f"{key} = {toml_value(values[key])}\n"
        for key in _STATED
        if key == "task" or values[key] != defaults[key]
    ]
    return "".join(lines) + (_EXAMPLES if len(lines) == 1 else "")


def _text(path: Path, template: str, values: dict[str, str]) -> None:
    path.write_text(Template(template).substitute(values), encoding="utf-8")


def _script(path: Path, template: str, values: dict[str, str]) -> None:
    _text(path, template, values)
    path.chmod(0o755)
