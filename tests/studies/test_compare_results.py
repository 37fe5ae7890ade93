from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.studies.compare_results import COLUMNS, Journal, read_rows, summarize
from fedlora_flwr.studies.compare_tables import document_of, markdown
from fedlora_flwr.studies.paired import Findings


def table_of(finals: Sequence[float | None], seeds: int) -> str:
    """Make the table of one method at ε = 1."""
    names = ("bytes_up", "bytes_down")
    rows: list[Any] = [
        dict.fromkeys(COLUMNS, "")
        | {"row": "rolora", "epsilon": 1.0, "final": final, "error": "" if final else "no"}
        | dict.fromkeys(names, 1500)
        for final in finals
    ]
    summary = summarize(rows, {("rolora", 1.0): (0.1, 0.02, 1.0)}, seeds)
    return markdown(document_of(summary, RunConfig(), "accuracy", 0, Findings("rolora")))


@pytest.mark.parametrize(
    ("finals", "cell"),
    [
        ([0.5], "**50.0**"),
        ([0.5, 0.6], "**55.0 ± 7.1**"),
        ([0.5, None], "50.0 (1 failed)"),
        ([0.5, 0.6, None], "55.0 ± 7.1 (1 failed)"),
        ([None], "failed"),
    ],
)
def test_cells_of_the_table(finals: list[float | None], cell: str) -> None:
    table = table_of(finals, len(finals))
    kilobytes = "1.5" if any(finals) else "–"
    (line,) = [line for line in table.splitlines() if "rolora" in line and cell in line]
    assert [part.strip() for part in line.strip("|").split("|")] == [
        "rolora",
        cell,
        kilobytes,
        kilobytes,
    ]
    assert "0.1 / 0.02 / 1" in table


def test_a_journal_reads_back_what_it_wrote(tmp_path: Path) -> None:
    values: dict[str, Any] = dict.fromkeys(COLUMNS, 1)
    texts = {"phase": "report", "row": "rolora", "strategy": "rolora", "error": ""}
    row: Any = {**values, **texts, "epsilon": math.inf, "lr-a": 0.1 + 0.2, "final": 1 / 3}
    bad: Any = {**row, "seed": 2, "final": None, "error": 'Error: "a, b" ε'}
    journal = Journal(tmp_path / "rows.csv")
    for entry in (row, bad):
        journal.append(entry)
    read = read_rows(tmp_path / "rows.csv").to_dict("records")
    assert read[0] == row
    assert read[1]["error"] == bad["error"]
    assert math.isnan(read[1]["final"])
    assert list(Journal(tmp_path / "rows.csv").rows.values()) == [row]
