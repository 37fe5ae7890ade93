"""Differences that pages state between two rows are worked out again from the committed rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.advice import PAGE
from benchmarks.mechanism_page import PAGE as MECHANISMS
from benchmarks.pictures import runs_of

NONE = math.inf
SKILLS = ("skills/rows.csv",)
STATED = [
    *((SKILLS, "dp-lora", "ffa-lora", epsilon, PAGE) for epsilon in (1, 3)),
    *((SKILLS, "dp-lora", "rolora", epsilon, PAGE) for epsilon in (0.5, 1, 3)),
    (SKILLS, "la-lora", "rolora", 1, MECHANISMS),
    (SKILLS, "rolora", "as-lora", 1, MECHANISMS),
]


@pytest.mark.parametrize(("files", "better", "other", "epsilon", "page"), STATED)
def test_a_stated_difference_by_seed_is_that_of_the_rows(
    files: tuple[str, ...], better: str, other: str, epsilon: float, page: Path
) -> None:
    runs = runs_of(*files)
    finals = [
        runs[(runs["row"] == row) & (runs["epsilon"] == epsilon)].set_index("seed")["final"]
        for row in (better, other)
    ]
    gaps = 100 * (finals[0] - finals[1])
    assert sorted(gaps.index) == [1, 2, 3]
    assert f"{gaps.mean():.1f} ± {gaps.std() / math.sqrt(3):.1f}" in page.read_text("utf-8")
