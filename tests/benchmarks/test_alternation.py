from __future__ import annotations

import torch

from benchmarks.alternation import measure
from benchmarks.figures import Figure
from tests.benchmarks.support import small_roberta


def test_one_factor_is_held_against_both_in_time_and_memory() -> None:
    found: list[Figure] = []

    measure([small_roberta()], 3, 1, torch.device("cpu"), found.append)

    ratios = {figure.what.rpartition(", ")[2]: figure.ratio for figure in found}
    assert len(ratios) == 4
    # B's gradient reads each layer's input times A, and not the input itself.
    assert ratios["B alone: peak memory"] < 0.95  # type: ignore[operator]
    assert ratios["B alone: peak memory"] <= ratios["A and B in turn: peak memory"]  # type: ignore[operator]
    bars = {figure.bar for figure in found if "in turn" in figure.what}
    assert bars == {0.9, 0.8}
