"""The scores' benchmark runs, and the documentation shows what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.as_lora_scores import ESTIMATES, NET, PUBLISHED, SINGLE, choices, measure, quadratic

ROOT = Path(__file__).parents[2]


def test_a_few_draws_give_every_column() -> None:
    row = measure(quadratic(), 0.008, 1.0, draws=3)
    for name in ("true", *ESTIMATES, "kappa"):
        assert np.isfinite(row[name]).all()
    assert abs(row[NET][0] - row["true"][0]) < 0.1
    found = choices(0.03, runs=2)
    assert list(found) == [PUBLISHED, SINGLE, NET]
    assert all(0 <= share <= 1 for row in found.values() for share in row.values())


def test_the_documentation_shows_these_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/as-lora-scores.json").read_text("utf-8"))
    text = (ROOT / "docs/methods.md").read_text("utf-8")
    for name in ("quadratic", "network"):
        for row in found[name]["rows"]:
            cells = [f"{row['noise']:g}"]
            cells += ["{:.2f} ± {:.2f}".format(*row[column]) for column in ("true", *ESTIMATES)]
            assert (
                f"| {' | '.join(cells)} | {row['kappa'][0]:.1f} ± {row['kappa'][1]:.1f} |" in text
            )
    for square, rules in found["choices"].items():
        cells = [
            f"{rule['share of A']:.0%} ({rule['one factor alone']:.1%})" for rule in rules.values()
        ]
        assert f"| {float(square):g} | {' | '.join(cells)} |" in text
