"""A device's own settings: whose data they are, where they lie, and what may be spent on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig, read_toml
from fedlora_flwr.errors import InvalidValue, one_of

DEVICE = "device"
"""Key of the node config that names the file: ``--node-config 'device="/etc/fedlora.toml"'``."""

CLIENT_ID, KEEP_WARM = "client-id", "keep-warm"
OWN = (
    "dataset", "dataset-subset", "train-split", "input-columns", "label-column", "model",
    "epsilon", "delta", "ledger-scope", "secure-noise", "reproducible", "state-dir",
    "report-unprotected-metrics",
    "microbatch-size", "precision", "compile", "device", "client-threads", "share-weights",
)  # fmt: skip
"""Keys of the run config that are a device's to say."""

_BUDGET = ("epsilon", "delta")
# A device has all of its data set, its ledger outlives a run, no server's seed draws its noise, and
# no server gets figures without privacy from it. Its process serves one message and is alone.
_DEFAULTS: Mapping[str, Any] = {
    "partitioner": "iid",
    "min-records": 1,
    "train-limit": 0,
    "ledger-scope": "lifetime",
    "reproducible": False,
    "report-unprotected-metrics": False,
    "share-weights": False,
}
_FOLDERS = ("dataset", "model")


@dataclass(frozen=True)
class Device:
    """What a device's file says.

    Parameters
    ----------
    client : str
        Stable identity of the device's data, for budget and cohorts.
    settings : Mapping[str, Any]
        Keys of `OWN`, which are in force over the run's.
    keep_warm : float (default: 0)
        Seconds for which a process that has served a message waits for the next one; 0 for a
        process a message.
    """

    client: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep_warm: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Device:
        """Read a device's TOML file. Folders in it may be relative to the file's.

        Raises
        ------
        InvalidValue
            The file cannot be read, has no ``client-id`` or no budget, or names a key that is not a
            device's.
        """
        found = read_toml(path)
        client = found.pop(CLIENT_ID, "")
        if not isinstance(client, str) or not client.strip():
            raise InvalidValue(CLIENT_ID, client, f"a name for the data of this device in {path}")
        keep_warm = found.pop(KEEP_WARM, 0.0)
        if isinstance(keep_warm, bool) or not isinstance(keep_warm, int | float) or keep_warm < 0:
            raise InvalidValue(KEEP_WARM, keep_warm, "seconds; 0 for a process a message")
        for key in _BUDGET:
            if key not in found:
                raise InvalidValue(key, None, f"a number in {path}: what may be spent on its data")
        for key, value in found.items():
            if key not in OWN:
                raise InvalidValue(f"key of {path.name}", key, one_of(OWN, key))
            local = path.parent / str(value)
            # Of a model or data set the name may be a hub's; a ledger's folder is made when needed.
            if value and (key == "state-dir" or (key in _FOLDERS and local.exists())):
                found[key] = str(local.resolve())
        return cls(client, found, float(keep_warm))

    @property
    def folders(self) -> Iterator[Path]:
        """The local data set and model that the file names."""
        named = (Path(str(self.settings[key])) for key in _FOLDERS if key in self.settings)
        return (path for path in named if path.is_dir())

    def config(self, run: Mapping[str, Any]) -> RunConfig:
        """Return a run's configuration as it is on this device.

        Raises
        ------
        InvalidValue
            A setting cannot be used.
        """
        return RunConfig.of(run, _DEFAULTS, self.settings)
