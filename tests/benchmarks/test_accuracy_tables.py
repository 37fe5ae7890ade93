"""The tables of accuracy in docs/results.md are made of the committed rows."""

from __future__ import annotations

import csv
import math
from statistics import fmean, stdev

import pytest

from benchmarks.accuracy_tables import TABLES, AccuracyTable, cells_of, page_with
from benchmarks.advice import PAGE
from benchmarks.pictures import ROWS

OWN_LABELS = ", own labels"
SHOWN = PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_rows_make_of_it() -> None:
    assert page_with(SHOWN) == SHOWN


@pytest.mark.parametrize("table", [one for one in TABLES if not one.rates], ids=lambda t: t.place)
def test_a_cell_has_the_mean_and_the_deviation_of_its_reported_runs(table: AccuracyTable) -> None:
    heads, *lines = cells_of(table)
    rows = []
    for file in table.files:
        with (ROWS / file).open(encoding="utf-8") as lines_in_file:
            rows += [row for row in csv.DictReader(lines_in_file) if row["phase"] == "report"]
    for line in lines:
        for head, cell in zip(heads[1:], line[1:], strict=True):
            if head.startswith("kB") or not cell:
                continue
            epsilon = math.inf if head == "no privacy" else float(head.removeprefix("ε = "))
            of = [row for row in rows if float(row["epsilon"]) == epsilon]
            found = [float(part) for part in cell.strip("*").split(" ± ")]
            if line[0] == "no training":
                seeds = sorted({row["seed"] for row in of})
                starts = [
                    fmean(100 * float(row["initial"]) for row in of if row["seed"] == seed)
                    for seed in seeds
                ]
                assert found == pytest.approx([fmean(starts), stdev(starts)], abs=0.0501)
                continue
            name = line[0].removesuffix(OWN_LABELS)
            figure = "final" if name == line[0] else "own_labels"
            finals = [
                100 * float(row[figure])
                for row in of
                if (row.get("row") or row["strategy"]) == name
            ]
            assert found == pytest.approx([fmean(finals), stdev(finals)], abs=0.0501)


def test_only_the_best_of_a_column_is_marked() -> None:
    heads, *every = cells_of(TABLES[0])
    lines = [line for line in every if not line[0].endswith(OWN_LABELS)]
    for place, head in enumerate(heads):
        if head.startswith(("ε", "no ")):
            cells = [line[place] for line in lines]
            best = max(float(cell.strip("*").split()[0]) for cell in cells)
            marked = [cell for cell in cells if cell.startswith("**")]
            assert marked
            assert {float(cell.strip("*").split()[0]) for cell in marked} == {best}
