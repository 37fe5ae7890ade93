"""Clients of a legacy server, whose arithmetic fits in a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.client import NumPyClient

from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan

Metrics = dict[str, Any]


class Counts(NumPyClient):
    """Adds its number plus one to what the plan trains."""

    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> tuple[list[Any], int, Any]:
        arrays = dict(zip(config["array-names"].split(","), parameters, strict=True))
        plan = ComponentPlan.parse(config["plan"])
        names = Layout.of(arrays).trained(plan, len(plan.steps))
        uploaded = [arrays[name] + self.partition + 1 for name in names]
        return uploaded, 10 + self.partition, {"array-names": ",".join(names), "note": "fine"}

    def evaluate(
        self, parameters: list[Any], config: Mapping[str, Any]
    ) -> tuple[float, int, Metrics]:
        return float(self.partition), 1 + self.partition, {"accuracy": 0.25}


def only(partitions: set[int], bad: type[NumPyClient]) -> Callable[[int], NumPyClient]:
    return lambda partition: (bad if partition in partitions else Counts)(partition)  # type: ignore[call-arg]


class Crashes(Counts):
    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> Any:
        raise RuntimeError(f"disk of client {self.partition} is full")
