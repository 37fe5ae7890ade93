"""The page of accounting shows the figures in the file, and some of them are computed again."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.accounting import (
    DELTAS,
    EXTREMES,
    RATES,
    RESULT,
    SIGMAS,
    STEPS,
    cell,
    extreme,
    filled,
    tables,
)
from fedlora_flwr.audit.bounds import gaussian_epsilon
from fedlora_flwr.privacy.accountants import ACCOUNTANTS

FOUND: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
GRID = {(row["q"], row["sigma"], row["steps"], row["delta"]): row for row in FOUND["grid"]}
AGAIN = [
    (0.001, 0.6, 1000, 1e-5),
    (0.01, 1.0, 100, 1e-8),
    (0.1, 2.0, 10_000, 1e-5),
    (0.1, 0.6, 10_000, 1e-5),
    (1.0, 8.0, 1000, 1e-8),
]


def test_the_page_shows_the_figures() -> None:
    page = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8")
    found = tables(FOUND)
    assert filled(page, found) == page
    assert all(table in page for table in found.values())


@pytest.mark.parametrize("setting", AGAIN)
def test_a_cell_is_computed_again(setting: tuple[float, float, int, float]) -> None:
    again = cell(*setting)
    assert {name: again[name] is None for name in ACCOUNTANTS} == {
        name: GRID[setting][name] is None for name in ACCOUNTANTS
    }
    for name in (*ACCOUNTANTS, "exact"):
        if again[name] is not None:
            assert GRID[setting][name] == pytest.approx(again[name], rel=1e-6, abs=1e-9)


def test_the_grid_is_whole_and_in_order() -> None:
    assert set(GRID) == set(product(RATES, SIGMAS, STEPS, DELTAS))
    for (rate, sigma, steps, delta), row in GRID.items():
        assert row["pld"] <= row["rdp"]
        assert row["prv"] is None or row["pld"] <= row["prv"] * 1.001 + 1e-3
        if rate == 1:
            exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
            assert exact == row["exact"] <= min(row["pld"], row["prv"] or math.inf)


def test_every_extreme_was_answered_in_two_seconds_and_half_a_gigabyte() -> None:
    rows = FOUND["extremes"]
    assert len(rows) == len(EXTREMES) * len(ACCOUNTANTS) == 48
    assert [row for row in rows if not (row["seconds"] < 2 and row["megabytes"] < 500)] == []
    assert all(0 <= row["epsilon"] < math.inf for row in rows)
    assert {row["answered"] for row in rows if row["asked"] == "rdp"} == {"rdp"}


def test_an_extreme_is_asked_again() -> None:
    setting = (1.0, 0.3, 1, 1e-3)
    rows = [row for row in FOUND["extremes"] if row["asked"] == "prv"]
    before = next(r for r in rows if (r["q"], r["sigma"], r["steps"], r["delta"]) == setting)
    again = extreme(*setting, "prv")
    assert again["epsilon"] == pytest.approx(before["epsilon"], rel=1e-6)
    assert again["answered"] == before["answered"] == "prv"
