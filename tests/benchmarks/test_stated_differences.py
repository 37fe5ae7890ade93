"""Differences that pages state between two rows are worked out again from the committed rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.advice import PAGE
from benchmarks.mechanism_page import PAGE as MECHANISMS
from tests.benchmarks.by_seed import Cell, stated_gap

NONE = math.inf
SST2 = ("sst2-minilm/all-methods.csv",)
CIFAR = ("cifar10-small-swin/dirichlet-0.5.csv",)
FEW = ("cifar10-small-swin/dirichlet-0.1.csv",)
SKILLS = ("skills/rows.csv",)
STATED = [
    *((SKILLS, "dp-lora", "ffa-lora", epsilon, PAGE) for epsilon in (1, 3)),
    *((SKILLS, "dp-lora", "rolora", epsilon, PAGE) for epsilon in (0.5, 1, 3)),
    *((SST2, "head-only", "dp-lora", epsilon, PAGE) for epsilon in (0.5, 8)),
    *((CIFAR, "ffa-lora", "head-only", epsilon, PAGE) for epsilon in (0.5, 1, 3, 8)),
    *((CIFAR, row, "head-only", NONE, PAGE) for row in ("dp-lora", "rolora")),
    *((CIFAR, "head-only", "as-lora", epsilon, PAGE) for epsilon in (1, 3)),
    (CIFAR, "rolora", "head-only", 0.5, PAGE),
    *((CIFAR, row, "dp-lora", 0.5, PAGE) for row in ("ffa-lora", "head-only")),
    *((FEW, row, "head-only", 3, PAGE) for row in ("ffa-lora", "rolora")),
    *((FEW, row, "head-only", NONE, PAGE) for row in ("dp-lora", "ffa-lora")),
    *((FEW, row, "dp-lora", 0.5, PAGE) for row in ("head-only", "rolora")),
    (FEW, "la-lora", "head-only", 8, PAGE),
    (FEW, "dp-lora", "la-lora", NONE, PAGE),
    (SKILLS, "la-lora", "rolora", 1, MECHANISMS),
    (SKILLS, "rolora", "as-lora", 1, MECHANISMS),
]


@pytest.mark.parametrize(("files", "better", "other", "epsilon", "page"), STATED)
def test_a_stated_difference_by_seed_is_that_of_the_rows(
    files: tuple[str, ...], better: str, other: str, epsilon: float, page: Path
) -> None:
    gap = stated_gap(Cell(files, better, epsilon), Cell(files, other, epsilon), seeds=3)
    assert gap in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("files", "row", "epsilon"),
    [
        *((SST2, row, epsilon) for row in ("head-only", "dp-lora") for epsilon in (0.5, 1, 3)),
        *((CIFAR, "head-only", epsilon) for epsilon in (0.5, 1, 3, 8)),
    ],
)
def test_a_stated_cost_of_privacy_is_that_of_the_rows(
    files: tuple[str, ...], row: str, epsilon: float
) -> None:
    cost = stated_gap(Cell(files, row, NONE), Cell(files, row, epsilon), seeds=3)
    assert cost in PAGE.read_text("utf-8")
