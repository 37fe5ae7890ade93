"""The table of audits, in its short form: two methods, each attacked in hundreds of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ROOT, audit


def test_the_short_form_finds_most_of_what_two_methods_claim(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        audit.main(["--quick", "--workers", "1", "--output", str(tmp_path)])
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["ffa-lora", "rolora"]
    assert all(row["canaries"] == 1200 and row["verdict"] == "holds" for row in rows)
    # The share was .6 on average in four attacks with 1,200 canaries. With 600 it was .48 in 16,
    # and chance sometimes took it below the .25 of "holds". More than 1 is a false promise.
    assert all(0.2 < row["ratio"] <= 1 for row in rows)
    table = (tmp_path / "table.md").read_text("utf-8")
    assert table.count("\n| digits |") == 2
    assert (tmp_path / "digits-rolora.png").stat().st_size > 10_000


def test_the_page_has_the_committed_rows() -> None:
    rows = json.loads((audit.RESULTS / "table.json").read_text("utf-8"))["rows"]
    table = (audit.RESULTS / "table.md").read_text("utf-8")
    assert table == audit.table_of(rows)
    assert table in (ROOT / "docs/privacy.md").read_text("utf-8")


def test_the_whole_table_has_each_method_mode_and_trust_model(tmp_path: Path) -> None:
    every = list(audit.cells(Path("llm-benchmark")))
    paired = [cell.config for cell in every if cell.mode == "paired"]
    assert [c.strategy for c in paired if not c.secure_sum] == list(audit.METHODS)
    assert {cell.mode for cell in every} == {"paired", "one run", "black box"}
    assert {cell.config.trust_model for cell in every} == {"local", "secure-sum"}
    assert all(cell.config.epsilon == 4.0 for cell in every)
    one = [cell for cell in every if cell.mode == "one run"]
    assert all(cell.records * cell.config.num_clients >= 400 for cell in one)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([], 16),
        (["paired", "secure-sum"], 1),
        (["one-run", "rolora", "as-lora"], 2),
        (["rolora"], 3),
        (["one-run", "black-box"], 5),
        (["black-box", "fedsvd"], 0),
    ],
)
def test_words_choose_the_rows_that_each_kind_of_word_allows(words: list[str], rows: int) -> None:
    every = audit.cells(Path("llm-benchmark"))
    assert sum(audit.named(cell, words) for cell in every) == rows
