"""Names of Flower that are not part of its public API, each from the one place that knows where.

A version of Flower that moves one of them is answered here. What a device replaces in Flower's own
processes is in `fedlora_flwr.deploy.flower`. Names are imported when first used, so that a strategy
does not load Flower's legacy server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.common.constant import ErrorCode as ErrorCode
    from flwr.common.constant import SType as SType
    from flwr.common.secure_aggregation.secaggplus_constants import (
        RECORD_KEY_CONFIGS as RECORD_KEY_CONFIGS,
    )
    from flwr.server.compat.grid_client_proxy import GridClientProxy as GridClientProxy
    from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM as KEY_CLIPPING_NORM
    from flwr.supercore.run import Run as Run
    from flwr.supercore.task_identity import TaskIdentity as TaskIdentity

_HOMES = {
    "ErrorCode": "flwr.common.constant",
    "SType": "flwr.common.constant",
    "RECORD_KEY_CONFIGS": "flwr.common.secure_aggregation.secaggplus_constants",
    "GridClientProxy": "flwr.server.compat.grid_client_proxy",
    "KEY_CLIPPING_NORM": "flwr.supercore.differential_privacy",
    "Run": "flwr.supercore.run",
    "TaskIdentity": "flwr.supercore.task_identity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
