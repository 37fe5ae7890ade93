"""How far one record moves what a device sends, measured on its uploads alone.

A device without noise that joins all records in one step sends the mean of clipped gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.hostile.device import RUN, Answer, Device

CLEAR = {"epsilon": math.inf, "reproducible": True}
"""Lines of a device's file that turn its noise off: for measurements only."""


def run_of(device: Device, records: int, **changes: Any) -> dict[str, Any]:
    """Return a run with one step over all records, at a learning rate of 1."""
    keys = {key.replace("_", "-"): value for key, value in changes.items()}
    one_step = {
        "task": device.own["task"], "batch-size": records, "local-steps": 1, "num-rounds": 1,
        "lr-a": 1.0, "lr-b": 1.0, "lr-head": 1.0,
    }  # fmt: skip
    return {**RUN, **one_step, **keys}


def summed(answer: Answer, sent: dict[str, NDArray[Any]], records: int) -> NDArray[np.float64]:
    """Return the sum of clipped gradients that an upload tells, shape (D,)."""
    moved = [
        (sent[name].astype(np.float64) - values).ravel() for name, values in answer.arrays.items()
    ]
    return np.concatenate(moved) * records


def moved(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return how far two sums are apart."""
    return float(np.linalg.norm(one - other))
