"""The run configuration: its keys are read, checked and written in this room only."""

from __future__ import annotations

from fedlora_flwr.config.keys import Decider, Value
from fedlora_flwr.config.on_device import LIMITED, OWN, Limit, device_config
from fedlora_flwr.config.overrides import parse_overrides
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.config.toml import read_toml

__all__ = [
    "LIMITED",
    "OWN",
    "Decider",
    "Limit",
    "RunConfig",
    "Value",
    "device_config",
    "parse_overrides",
    "read_toml",
]
