"""The grid of attacks runs, continues where it was stopped, and makes a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attack_table import PAGE, cost, met, section, table, written
from benchmarks.attacks import ATTACKS, NOBODY, RESULTS, Cell, Outcome, cells, measure, read


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


def test_the_most_telling_cells_come_first() -> None:
    first = list(cells())[: 5 * (1 + len(ATTACKS)) * 2]
    assert {(cell.strategy, cell.seed) for cell in first} == {("rolora", 42)}
    assert {cell.bad for cell in first} == {0, 1}
    assert {cell.epsilon for cell in first} == {8.0, 1.0}


def outcome(accuracy: float, triggered: float = 0.5) -> Outcome:
    return Outcome(accuracy, triggered, 0, 0, 8)


def test_a_table_has_means_over_seeds_dashes_and_bars() -> None:
    found = {
        Cell("rolora", 8.0, 0, NOBODY, "none", 42): outcome(0.80),
        Cell("rolora", 8.0, 0, NOBODY, "none", 43): outcome(0.90),
        Cell("rolora", 8.0, 0, NOBODY, "median", 42): outcome(0.78),
        Cell("rolora", 8.0, 1, "x100", "none", 42): outcome(0.25),
        Cell("rolora", 8.0, 1, "x100", "krum", 42): outcome(0.79),
        Cell("rolora", 8.0, 1, "x100", "krum", 43): outcome(0.87),
        Cell("rolora", 8.0, 1, "backdoor", "krum", 42): outcome(0.70, 0.25),
        Cell("rolora", 8.0, 3, "x100", "krum", 42): outcome(0.10),
        Cell("rolora", 1.0, 1, "x100", "krum", 42): outcome(0.10),
    }
    lines = table(found).splitlines()[2:]
    assert lines == [
        "| rolora | 8 | nobody | 85.0 (2) | – | – | 78.0 (1) **short** | – |",
        "| rolora | 8 | x100, 1 of 10 | 25.0 (1) | – | – | – | 83.0 (2) met |",
        "| rolora | 8 | backdoor, 1 of 10 | – | – | – | – | 70.0 (1) mark 25 % **short** |",
        "| rolora | 1 | x100, 1 of 10 | – | – | – | – | 10.0 (1) |",
        "| rolora | 8 | x100, 3 of 10 | – | – | – | – | 10.0 (1) |",
    ]
    assert "With one bad client, 1 of 2 measured cells meet the bar." in section(found)
    assert "- rolora, ε = 8, 1 of 10, seed 42: 3 of 35" in section(found)


def test_a_whole_grid_has_no_list_of_parts() -> None:
    text = section(dict.fromkeys(cells(), outcome(0.5)))
    assert text.endswith("All 1,350 runs of the grid were made.")


def test_a_cost_is_that_of_the_same_seeds() -> None:
    honest = Cell("rolora", 8.0, 0, NOBODY, "none", 42)
    bad = Cell("rolora", 8.0, 1, "x100", "krum", 42)
    found = {honest: outcome(0.80), bad: outcome(0.78)}
    assert cost(found, [bad]) == pytest.approx(2.0)
    assert met(found, [bad])
    assert not met({**found, bad: outcome(0.779)}, [bad])
    assert cost({bad: outcome(0.78)}, [bad]) is None


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="Write both comments"):
        written("# A page", {})


def test_the_documentation_shows_the_rows() -> None:
    page = PAGE.read_text("utf-8")
    assert written(page, read(RESULTS)) == page
