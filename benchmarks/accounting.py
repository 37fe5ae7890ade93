"""What each accountant says over a grid of settings, beside exact values, and what extremes cost.

At q = 1 the steps together are one Gaussian mechanism with μ = √steps/σ, whose ε is known without
any accountant. Each extreme setting is asked in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import ROOT
from benchmarks.figures import write_content
from fedlora_flwr.audit.bounds import gaussian_epsilon
from fedlora_flwr.environment import peak_memory
from fedlora_flwr.privacy import loss_grid
from fedlora_flwr.privacy.accountants import ACCOUNTANTS, Segment
from fedlora_flwr.privacy.budget import epsilon_spent

RESULT = ROOT / "benchmarks" / "results" / "accounting.json"
RATES, SIGMAS = (0.001, 0.01, 0.1, 1.0), (0.6, 1.0, 2.0, 8.0)
STEPS, DELTAS = (100, 1000, 10_000), (1e-5, 1e-8)
EXTREMES = list(product((1e-6, 1.0), (0.3, 100.0), (1, 10**6), (1e-12, 1e-3)))
END = "<!-- end of the table -->"
Row: TypeAlias = dict[str, Any]


def cell(rate: float, sigma: float, steps: int, delta: float) -> Row:
    """Return ε of one setting by each accountant: None where it does not answer."""
    history = [Segment(sigma, rate, steps)]
    found = {name: account(history, delta) for name, account in ACCOUNTANTS.items()}
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta) if rate == 1 else None
    row = {"q": rate, "sigma": sigma, "steps": steps, "delta": delta}
    return {**row, **found, "exact": exact}


def grid() -> Iterator[Row]:
    """Compute every cell of the grid."""
    for delta, rate, sigma, steps in product(DELTAS, RATES, SIGMAS, STEPS):
        yield cell(rate, sigma, steps, delta)


def extreme(rate: float, sigma: float, steps: int, delta: float, accountant: str) -> Row:
    """Ask for one ε in this process, and return it with its seconds and megabytes.

    Importing the libraries is not counted: it takes seconds and is the same for all settings.
    """
    loss_grid.opacus_analysis()
    from dp_accounting import pld

    assert pld
    before, began = peak_memory(), time.perf_counter()
    spent = epsilon_spent([Segment(sigma, rate, steps)], delta, accountant)
    seconds = time.perf_counter() - began
    grown = peak_memory() - before
    row = {"q": rate, "sigma": sigma, "steps": steps, "delta": delta, "asked": accountant}
    told = {"epsilon": spent.epsilon, "answered": spent.accountant}
    return {**row, **told, "seconds": round(seconds, 3), "megabytes": round(grown / 2**20, 1)}


def extremes() -> Iterator[Row]:
    """Ask for each extreme setting by each accountant, in a fresh process without a cache."""
    for setting, accountant in product(EXTREMES, ACCOUNTANTS):
        asked = json.dumps([*setting, accountant])
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.accounting", "--one", asked],
                env={**os.environ, "XDG_CACHE_HOME": empty}, cwd=ROOT, stdout=subprocess.PIPE,
                text=True, check=True,
            )  # fmt: skip
        yield json.loads(done.stdout)


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the Markdown tables of the page by their names."""
    found = {f"δ = {delta:g}": _by_rate(result["grid"], delta) for delta in DELTAS}
    exact = [row for row in result["grid"] if row["q"] == 1 and row["delta"] == DELTAS[0]]
    found["exact"] = _table(
        ["σ", "steps", "exact", "PRV", "PLD", "RDP"],
        [
            [f"{row['sigma']:g}", f"{row['steps']:,}"]
            + [_shown(row[name], 4) for name in ("exact", *ACCOUNTANTS)]
            for row in exact
        ],
    )
    found["extremes"] = _table(
        ["q", "σ", "steps", "δ", "PRV", "PLD", "RDP", "most seconds", "most MB"],
        [_extreme_row(result["extremes"], setting) for setting in EXTREMES],
    )
    return found


def _by_rate(rows: Sequence[Row], delta: float) -> str:
    by_place = {(r["q"], r["sigma"], r["steps"]): r for r in rows if r["delta"] == delta}
    heads = ["q", "σ", *(f"{steps:,} steps" for steps in STEPS)]
    lines = []
    for rate, sigma in product(RATES, SIGMAS):
        cells = [by_place[rate, sigma, steps] for steps in STEPS]
        shown = [" · ".join(_shown(one[name]) for name in ACCOUNTANTS) for one in cells]
        lines.append([f"{rate:g}", f"{sigma:g}", *shown])
    return _table(heads, lines)


def _extreme_row(rows: Sequence[Row], setting: tuple[float, float, int, float]) -> list[str]:
    rate, sigma, steps, delta = setting
    mine = {r["asked"]: r for r in rows if (r["q"], r["sigma"], r["steps"], r["delta"]) == setting}
    told = [
        _shown(mine[name]["epsilon"] if mine[name]["answered"] == name else None)
        for name in ACCOUNTANTS
    ]
    most = [max(row[key] for row in mine.values()) for key in ("seconds", "megabytes")]
    head = [f"{rate:g}", f"{sigma:g}", f"{steps:,}", f"{delta:g}"]
    return [*head, *told, f"{most[0]:.2f}", f"{most[1]:.0f}"]


def _shown(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str, found: Mapping[str, str]) -> str:
    """Return the page with its tables replaced, each between a comment with its name and an end."""

    def put(match: re.Match[str]) -> str:
        return f"{match[1]}\n{found[match[2]]}\n{END}"

    return re.sub(rf"(<!-- table: (.*?) -->)\n.*?{END}", put, page, flags=re.S)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute ε over a grid and at the extremes, in minutes; print Markdown tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accounting", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--read", type=Path, help="print the tables of this file, and compute none")
    parser.add_argument("--one", help="an extreme setting and its accountant as JSON, to ask here")
    parser.add_argument("--page", type=Path, help="page to write the tables into")
    given = parser.parse_args(argv)
    if given.one:
        print(json.dumps(extreme(*json.loads(given.one))))
        return
    if given.read:
        result = json.loads(given.read.read_text(encoding="utf-8"))
    else:
        result = {"grid": list(grid()), "extremes": list(extremes())}
    if given.output:
        write_content(given.output, "python -m benchmarks.accounting", result)
    for name, table in tables(result).items():
        print(f"{name}\n\n{table}\n")
    if given.page:
        text = filled(given.page.read_text(encoding="utf-8"), tables(result))
        given.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
