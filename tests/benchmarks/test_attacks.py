"""The grid of attacks runs, continues where it was stopped, and makes a table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.attacks import (
    ATTACKS,
    NOBODY,
    RESULTS,
    Cell,
    Outcome,
    cells,
    markdown,
    measure,
    read,
)


def test_the_grid_has_each_cell_once() -> None:
    every = list(cells())
    assert len(set(every)) == len(every)
    assert sum(cell.attack == NOBODY for cell in every) == 3 * 2 * 3 * 5
    assert sum(cell.attack != NOBODY for cell in every) == 3 * 2 * 3 * 5 * 2 * len(ATTACKS)
    assert all((cell.bad == 0) == (cell.attack == NOBODY) for cell in every)


def test_an_attack_is_found_and_a_second_call_runs_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    grid = list(cells(["rolora"], [8.0], [1], ["x100"], ["norm-bound", "none"], [42]))
    assert list(measure(grid, file, rounds=1, until=0.0)) == []
    (first,) = measure(grid[:1], file, rounds=1)
    assert (first[1].named, first[1].accused, first[1].rounds) == (1, 0, 1)
    ((cell, worse),) = measure(grid, file, rounds=1)
    assert cell == grid[1]
    assert worse.accuracy < first[1].accuracy - 0.2
    assert list(measure(grid, file, rounds=1)) == []
    assert read(file) == dict([first, (cell, worse)])


def test_a_table_has_means_over_seeds_and_dashes() -> None:
    found = {
        Cell("rolora", 8.0, 1, "x100", "none", seed): Outcome(value, 0.5, 0, 0, 20)
        for seed, value in ((1, 0.25), (2, 0.75))
    }
    found[Cell("rolora", 8.0, 1, "backdoor", "krum", 1)] = Outcome(0.8, 0.25, 0, 0, 20)
    lines = markdown(found).splitlines()
    assert lines[2] == "| rolora | 8 | x100, 1 of 10 | 50.0 | – | – | – | – |"
    assert lines[3] == "| rolora | 8 | backdoor, 1 of 10 | – | – | – | – | 80.0 (mark 25 %) |"


def test_the_documentation_shows_the_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text("utf-8")
    assert markdown(read(RESULTS)) in page
