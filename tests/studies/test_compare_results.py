from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.studies.compare_results import COLUMNS, Journal, Row, read_rows, summarize
from fedlora_flwr.studies.compare_tables import document_of, figures_and_rates, markdown
from fedlora_flwr.studies.paired import Findings


def table_of(finals: Sequence[float | None], seeds: int) -> str:
    """Make the table of one method at ε = 1."""
    names = ("bytes_up", "bytes_down")
    rows: list[Any] = [
        dict.fromkeys(COLUMNS, "")
        | {"row": "rolora", "epsilon": 1.0, "final": final, "error": "" if final else "no"}
        | dict.fromkeys(names, 1500)
        | {"own_labels": math.nan}
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


def test_own_models_are_shown_on_everybodys_labels_and_on_their_own() -> None:
    rows = [
        cast(Row, {"row": name, "epsilon": 3.0, "seed": seed, "error": "", "final": 0.5,
                   "bytes_up": 1, "bytes_down": 1} | own)
        for seed, share in ((1, 0.8), (2, 0.9))
        for name, own in (("fedsa-lora", {"own_labels": share}), ("rolora", {}))
    ]  # fmt: skip
    chosen = {(name, 3.0): None for name in ("fedsa-lora", "rolora")}
    figures, _ = figures_and_rates(summarize(rows, chosen, 2))
    assert [row[:2] for row in figures[1:]] == [
        ["fedsa-lora", "**50.0 ± 0.0**"],
        ["fedsa-lora, own labels", "85.0 ± 7.1"],
        ["rolora", "**50.0 ± 0.0**"],
    ]


def test_rows_of_a_version_without_own_labels_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    before = [name for name in COLUMNS if name != "own_labels"]
    values: dict[str, Any] = dict.fromkeys(before, 1) | {"error": ""}
    path.write_text(",".join(before) + "\n" + ",".join(str(values[n]) for n in before) + "\n")
    Journal(path).append(cast(Row, {**dict.fromkeys(COLUMNS, 2), "error": "", "own_labels": 0.75}))
    rows = read_rows(path)
    assert tuple(rows.columns) == COLUMNS
    assert rows["seed"].tolist() == [1, 2]
    assert rows["own_labels"].isna().tolist() == [True, False]
