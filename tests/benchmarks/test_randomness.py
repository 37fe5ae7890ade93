"""The benchmark of noise passes sources that are right, and fails those that are slightly wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import ROOT
from benchmarks.randomness import COARSE, COUNT, examine, sources

ENOUGH = 200_000
RESULT = ROOT / "benchmarks" / "results" / "randomness.json"


def unmet(draw: Callable[[int], NDArray[Any]], deviation: int = 0) -> list[str]:
    found = list(examine("x", draw, deviation, ENOUGH))
    assert len(found) == 18
    return [one.what.removeprefix("x: ") for one in found if not one.met]


@pytest.mark.parametrize("name", sources())
def test_each_source_follows_its_law(name: str) -> None:
    assert unmet(*sources()[name]) == []


def normal(count: int) -> NDArray[np.float64]:
    return np.random.default_rng(1).standard_normal(count)


WRONG: dict[str, tuple[Callable[[int], NDArray[Any]], int, str]] = {
    "a mean of 2 %": (lambda n: normal(n) + 0.02, 0, "mean"),
    "3 % less noise": (lambda n: 0.97 * normal(n), 0, "variance"),
    "heavier tails": (
        lambda n: np.where(np.arange(n) % 300, 1, 2) * normal(n), 0, "excess kurtosis",
    ),
    "no tail": (lambda n: normal(n).clip(-3, 3), 0, "beyond 3 deviations"),
    "each twice": (lambda n: np.repeat(normal(n // 2), 2), 0, "correlation at lag 1"),
    "a sign of its own": (
        lambda n: np.repeat(normal(n // 2), 2) * np.where(np.arange(n) % 4 < 3, 1, -1),
        0,
        "correlation of squares at lag 1",
    ),
    "rounded, not discrete": (
        lambda n: np.floor(COARSE * normal(n)).astype(np.int64), COARSE, "chi-square",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_source_that_is_slightly_wrong_is_seen(name: str) -> None:
    draw, deviation, row = WRONG[name]
    assert row in unmet(draw, deviation)


def test_ten_million_samples_of_each_source_were_within_their_bounds() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))["figures"]
    assert [name for name in found if name != "costs"] == list(sources())
    assert COUNT == 10_000_000
    rows = [row for name, part in found.items() if name != "costs" for row in part]
    assert len(rows) == 4 * 18
    assert [row["what"] for row in rows if not row["met"]] == []
