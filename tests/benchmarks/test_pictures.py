"""The pictures of two pages are drawn from the committed rows, as their tables are."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks.mechanism_page import PAGE as MECHANISMS
from benchmarks.mechanism_pictures import DRAWN
from benchmarks.pictures import MODES, OF, PICTURES, pictures, runs_of
from tests.benchmarks.by_seed import Cell, stated_gap

PAGE = (PICTURES.parent / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "files"), [(name, files) for name, (_, *files) in OF.items()])
def test_the_page_has_the_figures_that_are_drawn(name: str, files: list[str]) -> None:
    section = re.split(r"\n##+ ", PAGE.split(f"](results/{name})")[0])[-1]
    found = runs_of(*files).groupby(["row", "epsilon"])["final"].agg(["mean", "std"]) * 100
    assert len(found) >= 10
    for method, rows in found.groupby("row"):
        (line,) = re.findall(rf"^\| {method} +\|(.*)$", section.replace("**", ""), re.M)
        # An empty cell was not measured. Behind these cells are bytes and other remarks.
        cells = [cell.strip() for cell in line.split("|") if cell.strip()][: len(rows)]
        expected = [
            f"{mean:.1f}" + ("" if math.isnan(std) else f" ± {std:.1f}")
            for mean, std in rows.itertuples(index=False)
        ]
        assert cells == expected


SUMS = ("dp-lora", "flexlora", "flora", "fedex-lora")
TURNS = ("ffa-lora", "rolora", "la-lora", "as-lora", "fedsvd")


@pytest.mark.parametrize(
    ("better", "other", "epsilon"),
    [
        *(("dp-lora", exact, e) for exact in ("flexlora", "flora", "fedex-lora") for e in (0.5, 1)),
        *(("ffa-lora", method, 1.0) for method in ("rolora", "as-lora", "la-lora")),
        *(("head-only", method, e) for method in ("ffa-lora", "as-lora") for e in (0.5, 1.0)),
        *(("rolora", method, 3.0) for method in ("ffa-lora", "as-lora", "flora", "head-only")),
        ("rolora", "head-only", 8.0),
        ("rolora", "head-only", math.inf),
        (TURNS, SUMS, 0.5),
        (TURNS, SUMS, 1.0),
    ],
)
def test_differences_by_seed_are_those_of_the_rows(
    better: str | tuple[str, ...], other: str | tuple[str, ...], epsilon: float
) -> None:
    """Each figure is worked out here by hand: the mean of five differences and its error."""
    runs = runs_of(*OF["accuracy.png"][1:])
    runs = runs[runs["epsilon"] == epsilon]

    def mean(names: str | tuple[str, ...], seed: int) -> float:
        wanted = (names,) if isinstance(names, str) else names
        found = [
            float(runs["final"][(runs["row"] == name) & (runs["seed"] == seed)].item())
            for name in wanted
        ]
        return 100 * sum(found) / len(found)

    found = [mean(better, seed) - mean(other, seed) for seed in range(1, 6)]
    center = sum(found) / 5
    error = math.sqrt(sum((value - center) ** 2 for value in found) / 4 / 5)
    assert f"{center:.1f} ± {error:.1f}" in PAGE


LOCAL = ("digits/rows.csv", "digits/head-only.csv")
SUM = ("secure-sum/digits.csv",)
SUM_SECTION = PAGE.partition("\n## Noise shared over a secure sum")[2].partition("\n### ")[0]
SUM_SECTION += (PICTURES.parent / "trust_models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("better", "other", "epsilons", "files"),
    [
        *((m, m, (e, e), (SUM, LOCAL)) for m in ("ffa-lora", "head-only") for e in (0.5, 1, 3)),
        *(
            (m, m, (e, e), (SUM, LOCAL))
            for m, e in (("rolora", 0.5), ("as-lora", 1), ("la-lora", 3))
        ),
        *((m, m, (8, 8), (SUM, LOCAL)) for m in ("as-lora", "ffa-lora")),
        *((m, m, (math.inf, 1), (LOCAL, SUM)) for m in ("as-lora", "ffa-lora")),
        *((m, "head-only", (1, 1), (SUM, SUM)) for m in ("as-lora", "ffa-lora")),
        *((m, "head-only", (3, 3), (SUM, SUM)) for m in ("as-lora", "dp-lora")),
        *(("ffa-lora", "dp-lora", (e, e), (SUM, SUM)) for e in (0.5, 1)),
    ],
)
def test_gains_of_the_secure_sum_are_those_of_the_rows(
    better: str,
    other: str,
    epsilons: tuple[float, float],
    files: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    first, second = (Cell(*each) for each in zip(files, (better, other), epsilons, strict=True))
    assert stated_gap(first, second, seeds=5) in SUM_SECTION


def test_the_pictures_of_the_pages_are_drawn_again(tmp_path: Path) -> None:
    drawn = {path.name: path for path in pictures(tmp_path)}
    shown = [
        set(re.findall(r"\]\(results/([\w.-]+)\)", page))
        for page in (PAGE, MECHANISMS.read_text(encoding="utf-8"))
    ]
    assert shown == [{*OF, MODES}, {*DRAWN}]
    assert drawn.keys() == shown[0] | shown[1] == {path.name for path in PICTURES.glob("*.png")}
    assert max(drawn[name].stat().st_size for name in DRAWN) < 100_000
