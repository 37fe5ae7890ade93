"""The folder of what a client keeps: its ledger, and arrays that stay with it."""

from __future__ import annotations

from pathlib import Path

from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.files import data_folder


def state_folder(config: RunConfig) -> Path:
    """Return the folder of the ledger and local arrays: ``state-dir``, or the data folder.

    Parameters
    ----------
    config : RunConfig
        The configuration of a client.

    Examples
    --------
    >>> state_folder(RunConfig(state_dir="/var/lib/ward-7")).name
    'ward-7'
    """
    return state_folder_of(config.state_dir)


def state_folder_of(state_dir: str) -> Path:
    """Return the folder that a value of ``state-dir`` means on this machine."""
    return Path(state_dir) if state_dir else data_folder()
