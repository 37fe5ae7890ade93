"""A device's own settings: its identity, the place of its data, and the budget for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedlora_flwr.config import OWN, Limit, RunConfig, device_config, read_toml
from fedlora_flwr.config.keys import check_value, fields_by_key
from fedlora_flwr.config.names import by_short_name
from fedlora_flwr.config.trust import ANYBODY, SECURE_SUM
from fedlora_flwr.errors import InvalidValue, require, unknown
from fedlora_flwr.tasks.registry import extras_of, required_on_device
from fedlora_flwr.wire import partition_name

DEVICE = "device"
"""Key of the node config for the file's path: ``--node-config 'device="/etc/fedlora.toml"'``."""

CLIENT_ID, KEEP_WARM, LIMITS = "client-id", "keep-warm", "limits"
TRUST_MODEL = "trust-model"
_REQUIRED = {
    "epsilon": "a number, the ε that may be spent on this device's records",
    "delta": "a number, the δ that may be spent on this device's records",
    "task": "the task that this device takes part in",
}
_OF_A_SUM = {
    "peers": f"a file with the identities of all devices, or {ANYBODY!r}",
    "colluding": "the number of devices that may side with the server, in this owner's judgment",
}
_FOLDERS = ("dataset", "model")
# Values that an owner may choose although they break or nearly break the promise.
_UNDO: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epsilon": (math.isinf, "no noise is added"),
    "reproducible": (bool, "the noise follows the run's seed, which the server knows"),
    "report-unprotected-metrics": (
        bool,
        "a server may ask for the loss on the records at any weights, which no ledger counts",
    ),
    "peers": (
        ANYBODY.__eq__,
        "a server may invent clients, whose shares of a secure sum's noise it knows",
    ),
    "ledger-scope": (
        "run".__eq__,
        "each run may spend the whole budget, and a server may start any number of runs",
    ),
}


@dataclass(frozen=True)
class Device:
    """The settings in a device's file.

    Parameters
    ----------
    client : str
        Stable identity of the device's data, for budget and cohorts.
    settings : Mapping[str, Any]
        Keys of `OWN`. A server cannot set them, not even those that the file leaves out.
    keep_warm : float (default: 0)
        Seconds for which a process that has served a message waits for the next one; 0 for one
        process per message.
    limits : Mapping[str, Limit]
        The values of a run that the device accepts, by key.
    """

    client: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep_warm: float = 0.0
    limits: Mapping[str, Limit] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Device:
        """Read a device's TOML file. Paths in it may be relative to the file's folder.

        Raises
        ------
        InvalidValue
            The file cannot be read; it lacks ``client-id``, the budget, the task or a key that the
            task needs; it has a key that devices do not have; or a value cannot be used.
        """
        found = read_toml(path)
        client = found.pop(CLIENT_ID, "")
        if not isinstance(client, str) or not client.strip() or not client.isprintable():
            raise InvalidValue(CLIENT_ID, client, f"a name for the data of this device in {path}")
        keep_warm = found.pop(KEEP_WARM, 0.0)
        if isinstance(keep_warm, bool) or not isinstance(keep_warm, int | float) or keep_warm < 0:
            raise InvalidValue(KEEP_WARM, keep_warm, "seconds; 0 for one process per message")
        limits = found.pop(LIMITS, {})
        if not isinstance(limits, dict):
            raise InvalidValue(LIMITS, limits, "a table, [limits]")
        found = by_short_name(found)
        for key in found:
            if key not in OWN:
                raise unknown(f"key of {path.name}", key, OWN)
        _check_complete(found, path)
        settings = {key: _local(key, value, path.parent) for key, value in found.items()}
        read_limits = {key: Limit.read(key, value) for key, value in by_short_name(limits).items()}
        return cls(client, settings, float(keep_warm), read_limits)

    @property
    def folders(self) -> Iterator[Path]:
        """The local data set and model that the file names."""
        named = (Path(str(self.settings[key])) for key in _FOLDERS if key in self.settings)
        return (path for path in named if path.is_dir())

    def undone(self) -> Iterator[tuple[str, str]]:
        """Yield each key with a value that breaks the promise against a server, and why."""
        for key, (undoes, why) in _UNDO.items():
            if key in self.settings and undoes(self.settings[key]):
                yield key, why

    def require(self) -> None:
        """Check that the packages that the task needs are installed.

        Raises
        ------
        NotInstalled
            A package is missing.
        """
        require(*extras_of(str(self.settings["task"])))

    def config(self, run: Mapping[str, Any]) -> RunConfig:
        """Return a run's configuration on this device: the run's values and the device's own.

        Raises
        ------
        OrderRefused
            The run has a value that this package or this device does not accept.
        InvalidValue
            The device's own values cannot be used with the run's.
        """
        return device_config(run, self.settings, self.limits)


def _check_complete(found: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that cannot be used, or that leave out what the device itself must decide."""
    for key, allowed in _REQUIRED.items():
        if key not in found:
            raise InvalidValue(key, None, f"{allowed}, in {path}")
    # The rules of a secure sum also need values of the run, so its keys are checked one by one.
    added = ("state-dir", TRUST_MODEL, *_OF_A_SUM)
    alone = {key: value for key, value in found.items() if key not in added}
    RunConfig.received(alone)
    for key in (TRUST_MODEL, *_OF_A_SUM):
        if key in found:
            check_value(fields_by_key(RunConfig)[key], found[key])
    if found.get(TRUST_MODEL) == SECURE_SUM:
        for key, allowed in _OF_A_SUM.items():
            if key not in found:
                raise InvalidValue(key, None, f"{allowed}, in {path}")
    for keys in required_on_device(found["task"]):
        if not any(found.get(key) for key in keys):
            allowed = f"a value in {path}, which task = {found['task']!r} needs"
            raise InvalidValue(" or ".join(keys), None, allowed)


def _local(key: str, value: Any, folder: Path) -> Any:
    """Resolve a path relative to the device's file. Other values stay as they are."""
    local = folder / str(value)
    # A model or data set may be a name on a hub. The ledger's folder is made when needed.
    if value and (
        key == "state-dir"
        or (key == "peers" and value != ANYBODY)
        or (key in _FOLDERS and local.exists())
    ):
        return str(local.resolve())
    return value


def client_identity(context: Context) -> str:
    """Return a client's stable identity: from its device's file, ``client-id`` or partition.

    Raises
    ------
    InvalidValue
        The node config has none of them, or a device's file cannot be used.

    Examples
    --------
    >>> from flwr.app import RecordDict
    >>> client_identity(Context(1, 1, {"client-id": "hospital-7"}, RecordDict(), {}))
    'hospital-7'
    >>> client_identity(Context(1, 1, {"partition-id": 3}, RecordDict(), {}))
    'partition-000003'
    """
    config = context.node_config
    if DEVICE in config:
        return Device.read(Path(str(config[DEVICE]))).client
    if "client-id" in config:
        return str(config["client-id"])
    if "partition-id" in config:
        return partition_name(int(config["partition-id"]))
    raise InvalidValue("node config", dict(config), "'device', 'client-id' or 'partition-id'")
