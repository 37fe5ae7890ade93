"""Flower's and NVIDIA FLARE's averages under the faults that this package is tested with.

Run ``python -m benchmarks.stock_faults``. Five clients answer one round of some strategies of the
installed Flower; one client goes wrong. The table shows what the global array is afterward. If
NVIDIA FLARE is installed, the sum that its FedAvg keeps gets the same answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, Strategy
from numpy.typing import NDArray

from fedlora_flwr.simulations.local_grid import LocalGrid

CLIENTS, BAD, SHAPE = 5, 1, (4, 3)
Numbers = dict[str, NDArray[Any]]
HONEST = 1.0
"""What each honest client adds to every entry, so 1.0 is the right result."""


def _raise(arrays: Numbers) -> Numbers:  # noqa: ARG001
    raise ValueError("the client's own error")


FAULTS: Mapping[str, Callable[[Numbers], Numbers]] = {
    "nobody": dict,
    "an error": _raise,
    "NaN": lambda arrays: {"w": np.where(np.arange(12).reshape(SHAPE) == 0, np.nan, arrays["w"])},
    "wrong shape": lambda arrays: {"w": arrays["w"].T.copy()},
    "one number": lambda arrays: {"w": 9 * arrays["w"][:1, :1]},
    "another name": lambda arrays: {"v": arrays["w"]},
    "an additional array": lambda arrays: {**arrays, "backdoor": arrays["w"]},
    "update times 100": lambda arrays: {"w": 100 * arrays["w"]},
    "a negative weight": lambda arrays: {"w": 2 * arrays["w"]},
}
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0, **_ALL),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2, **_ALL),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0, **_ALL),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_nodes=1, **_ALL),
}
_ALL: dict[str, Any] = {"min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS}


def answer(client: int, fault: str) -> tuple[Numbers, float]:
    """Return what a client sends, and the weight that it states."""
    arrays: Numbers = {"w": np.full(SHAPE, HONEST)}
    if client != BAD:
        return arrays, 1.0
    return FAULTS[fault](arrays), -3.0 if fault == "a negative weight" else 1.0


def outcome(strategy: Strategy, fault: str) -> str:
    """Run one round and say what became of the global array."""

    def respond(message: Message, context: Context) -> Message:
        arrays, weight = answer(int(context.node_config["partition-id"]), fault)
        record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
        content: dict[str, Any] = {
            "arrays": record,
            "metrics": MetricRecord({"num-examples": weight}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    start = ArrayRecord({"w": Array(np.zeros(SHAPE))})
    with LocalGrid(respond, CLIENTS, {}).running() as grid:
        try:
            result = strategy.start(grid, start, num_rounds=1)
        except Exception as error:  # Any error is what is asked about.
            return f"the run ends with {type(error).__name__}"
    return described({name: array.numpy() for name, array in result.arrays.items()})


def flare_outcome(fault: str) -> str:
    """Add the same answers to the sum that NVIDIA FLARE's FedAvg keeps."""
    aggregation = importlib.import_module(
        "nvflare.app_common.aggregators.weighted_aggregation_helper"
    )
    helper = aggregation.WeightedAggregationHelper()
    try:
        for client in range(CLIENTS):
            if client == BAD and fault == "an error":
                continue  # Its controller passes over a result with an error.
            helper.add(*answer(client, fault), f"client {client}", 1)
        return described(helper.get_result())
    except Exception as error:  # Any error is what is asked about.
        return f"the run ends with {type(error).__name__}"


def described(found: Numbers) -> str:
    """Say whether the global array is right."""
    if set(found) != {"w"}:
        return f"the global arrays are {', '.join(found)}"
    if not np.isfinite(found["w"]).all():
        return "NaN in the global array"
    if found["w"].shape != SHAPE:
        return f"the global array has the shape {found['w'].shape}"
    low, high = float(found["w"].min()), float(found["w"].max())
    if np.isclose([low, high], HONEST).all():
        return "right"
    return "nothing is learned" if low == high == 0.0 else f"{high:.3g} for {HONEST:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of faults and strategies."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.stock_faults", description=__doc__
    ).parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    flare = importlib.util.find_spec("nvflare") is not None
    columns = [*STRATEGIES, *["FLARE's FedAvg"] * flare]
    print(f"| one of {CLIENTS} clients sends | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for fault in FAULTS:
        cells = [outcome(make(), fault) for make in STRATEGIES.values()]
        cells += [flare_outcome(fault)] * flare
        print(f"| {fault} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
