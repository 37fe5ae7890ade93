"""Names of Flower that are outside its public API; other modules import them from here.

If a version of Flower moves one of them, only this module has to change. The parts of Flower's
processes that a device replaces are in `fedlora_flwr.deploy.flower`. A name is imported when it is
first used, so a strategy does not load Flower's legacy server.
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
    from flwr.common.serde import user_config_from_proto as user_config_from_proto
    from flwr.proto.control_pb2 import ListNodesRequest as ListNodesRequest
    from flwr.proto.control_pb2 import ListRunsRequest as ListRunsRequest
    from flwr.proto.fleet_pb2 import ActivateNodeRequest as ActivateNodeRequest
    from flwr.server.compat.grid_client_proxy import GridClientProxy as GridClientProxy
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend as RayBackend
    from flwr.supercore.control import ControlHttpClient as ControlHttpClient
    from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM as KEY_CLIPPING_NORM
    from flwr.supercore.error import ApiErrorCode as ApiErrorCode
    from flwr.supercore.error import FlowerError as FlowerError
    from flwr.supercore.run import Run as Run
    from flwr.supercore.task_identity import TaskIdentity as TaskIdentity
    from flwr.superlink.grid import InMemoryGrid as InMemoryGrid
    from flwr.supernode.fleet_http_client import FleetHttpClient as FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import (
        NodeAuthHttpInterceptor as NodeAuthHttpInterceptor,
    )

_HOMES = {
    "ErrorCode": "flwr.common.constant",
    "SType": "flwr.common.constant",
    "RECORD_KEY_CONFIGS": "flwr.common.secure_aggregation.secaggplus_constants",
    "user_config_from_proto": "flwr.common.serde",
    "ListNodesRequest": "flwr.proto.control_pb2",
    "ListRunsRequest": "flwr.proto.control_pb2",
    "ActivateNodeRequest": "flwr.proto.fleet_pb2",
    "GridClientProxy": "flwr.server.compat.grid_client_proxy",
    "RayBackend": "flwr.server.superlink.fleet.vce.backend.raybackend",
    "ControlHttpClient": "flwr.supercore.control",
    "KEY_CLIPPING_NORM": "flwr.supercore.differential_privacy",
    "ApiErrorCode": "flwr.supercore.error",
    "FlowerError": "flwr.supercore.error",
    "Run": "flwr.supercore.run",
    "TaskIdentity": "flwr.supercore.task_identity",
    "InMemoryGrid": "flwr.superlink.grid",
    "FleetHttpClient": "flwr.supernode.fleet_http_client",
    "NodeAuthHttpInterceptor": "flwr.supernode.node_auth_http_interceptor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
