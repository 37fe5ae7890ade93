"""Differences that pages state between two rows are worked out again from the committed rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.advice import PAGE
from benchmarks.mechanism_page import PAGE as MECHANISMS
from benchmarks.pictures import ROWS
from fedlora_flwr.studies.compare_results import read_rows
from tests.benchmarks.by_seed import Cell, stated_gap

NONE = math.inf
SST2 = ("sst2-minilm/all-methods.csv",)
CIFAR = ("cifar10-small-swin/dirichlet-0.5.csv",)
FEW = ("cifar10-small-swin/dirichlet-0.1.csv",)
SKILLS = ("skills/rows.csv",)
SST2_SUM = ("secure-sum/sst2-all-methods.csv",)
CIFAR_SUM = ("secure-sum/cifar10-dirichlet-0.5.csv",)
FEW_SUM = ("secure-sum/cifar10-dirichlet-0.1.csv",)
SKILLS_SUM = ("secure-sum/skills.csv",)
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
    *((SST2_SUM, row, "head-only", 8, PAGE) for row in ("rolora", "ffa-lora")),
    (SST2_SUM, "head-only", "dp-lora", 1, PAGE),
    *((CIFAR_SUM, row, "head-only", 0.5, PAGE) for row in ("rolora", "dp-lora")),
    (CIFAR_SUM, "ffa-lora", "dp-lora", 0.5, PAGE),
    (FEW_SUM, "dp-lora", "head-only", 8, PAGE),
    (FEW_SUM, "dp-lora", "rolora", 1, PAGE),
    *((SKILLS_SUM, "dp-lora", "ffa-lora", epsilon, PAGE) for epsilon in (0.5, 1, 3)),
    *((SKILLS_SUM, "dp-lora", "rolora", epsilon, PAGE) for epsilon in (0.5, 8)),
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


@pytest.mark.parametrize(
    ("higher", "lower", "row", "epsilon"),
    [
        *((SST2_SUM, SST2, row, 0.5) for row in ("head-only", "dp-lora")),
        (SST2_SUM, SST2, "as-lora", 3),
        (SST2_SUM, SST2, "rolora", 8),
        *((CIFAR_SUM, CIFAR, row, 0.5) for row in ("dp-lora", "rolora", "ffa-lora", "head-only")),
        (CIFAR_SUM, CIFAR, "head-only", 1),
        (CIFAR_SUM, CIFAR, "dp-lora", 8),
        *((FEW_SUM, FEW, "dp-lora", epsilon) for epsilon in (0.5, 1)),
        *((FEW_SUM, FEW, "head-only", epsilon) for epsilon in (1, 3, 8)),
        (SKILLS_SUM, SKILLS, "dp-lora", 0.5),
        *((SKILLS, SKILLS_SUM, "dp-lora", epsilon) for epsilon in (3, 8)),
    ],
)
def test_a_stated_difference_between_the_trust_models_is_that_of_the_rows(
    higher: tuple[str, ...], lower: tuple[str, ...], row: str, epsilon: float
) -> None:
    gain = stated_gap(Cell(higher, row, epsilon), Cell(lower, row, epsilon), seeds=3)
    assert gain in PAGE.read_text("utf-8")


def test_what_a_lower_rate_of_a_gives_rolora_is_that_of_the_rows() -> None:
    rows = read_rows(ROWS / SKILLS_SUM[0])
    lower = rows[rows["row"] == "rolora, lr-a 0.002, lr-b 0.012"]
    means = 100 * lower.groupby("epsilon")["final"].mean()
    assert list(means.index) == [0.5, 1, 3, 8]
    *first, last = (f"{mean:.1f}" for mean in means)
    assert f"{', '.join(first)} and {last} %" in PAGE.read_text("utf-8")
