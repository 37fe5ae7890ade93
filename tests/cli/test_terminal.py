"""Tables at any width, errors that nobody expected, and commands that are looked up."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.terminal import Bar, Commands, Table, counted, show, show_json, show_lines

NUMBERS = Table(
    ["client", *(f"class-{i}" for i in range(12))],
    [[str(c), *(str(c * i) for i in range(12))] for c in range(3)],
    ">" * 13,
)
TEXT = Table(
    ["key", "default", "meaning"],
    [["rank", "4", "LoRA rank r"], ["blocks", '""', " ".join(["pattern of names"] * 12)]],
    "<<<",
)


def printed(table: Table, width: int, terminal: bool) -> list[str]:
    stream = io.StringIO()
    show(Console(file=stream, width=width, force_terminal=terminal), table)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("table", [NUMBERS, TEXT], ids=["numbers", "text"])
def test_in_a_pipe_a_row_is_a_line_without_color_however_wide(table: Table) -> None:
    lines = printed(table, 80, terminal=False)
    assert len(lines) == 1 + len(table.rows)
    assert max(map(len, lines)) > 80
    assert "\x1b" not in "".join(lines)
    for line, row in zip(lines[1:], table.rows, strict=True):
        assert line.split() == " ".join(row).split()


def test_text_wraps_in_its_own_column_on_a_terminal() -> None:
    lines = printed(TEXT, 80, terminal=True)
    assert max(map(len, lines)) <= 80
    assert len(lines) > 3
    indent = lines[0].index("meaning")
    assert (lines[1].index("LoRA"), lines[2].index("pattern")) == (indent, indent)
    assert all(line[:indent].strip() == "" for line in lines[3:])
    assert " ".join(line[indent:].strip() for line in lines[2:]) == TEXT.rows[1][2]
    assert printed(TEXT, 300, terminal=True) == printed(TEXT, 80, terminal=False)


def test_columns_that_do_not_fit_continue_below_with_the_first_column() -> None:
    lines = printed(NUMBERS, 80, terminal=True)
    assert max(map(len, lines)) <= 80
    parts = [part.splitlines() for part in "\n".join(lines).split("\n\n")]
    assert len(parts) == 2
    for part in parts:
        assert [line.split()[0] for line in part] == ["client", "0", "1", "2"]
    heads = [head for part in parts for head in part[0].split()[1:]]
    assert heads == NUMBERS.heads[1:]
    cells = [cell for part in parts for cell in part[3].split()[1:]]
    assert cells == NUMBERS.rows[2][1:]
    assert len(printed(NUMBERS, 200, terminal=True)) == 4


words = st.text("abc εσ", min_size=1, max_size=12).map(lambda text: text.strip() or "x")


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(words, min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.sampled_from("<>"),
    st.integers(1, 60),
)
def test_no_cell_is_ever_lost(rows: list[list[str]], side: str, width: int) -> None:
    table = Table((), rows, side * len(rows[0]))
    wide, narrow = table.lines(), table.lines(width)
    assert len(wide) == len(rows)
    for row in rows:
        for cell in row:
            assert any(cell in line for line in wide)
            for word in cell.split():
                assert any(word in line for line in narrow)
    if max(map(cell_len, wide)) <= width:
        assert narrow == wide


def test_a_path_stays_whole_and_markup_is_text() -> None:
    stream = io.StringIO()
    path = "/a/" + "long-folder/" * 12
    show_lines(Console(file=stream, width=40, force_terminal=True), [("Results", path)])
    show_lines(
        Console(file=stream, width=40, force_terminal=True), [("", "[bold]x[/bold] :smile:")]
    )
    assert path in stream.getvalue()
    assert "[bold]x[/bold] :smile:" in stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_progress_bar_cuts_neither_its_count_nor_its_line(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, no_color=True)
    state = "report la-lora, binomial ε 8, seed 1: 86.7% in 12 s"
    with Bar(console, "run") as bar:
        bar.to(0, 40, "starting")
        bar.to(3, 40, state)
    shown = " ".join(stream.getvalue().split())
    assert " 3/40 " in shown
    assert state in shown
    assert "…" not in shown


def test_an_empty_table_is_nothing() -> None:
    assert Table((), [], "").lines(80) == []
    assert Table(("a", "b"), [], "<<").lines() == ["a  b"]


def test_a_row_is_one_line_even_if_a_cell_has_two() -> None:
    assert Table((), [["a\nb", "c\r\nd"]], "<<").lines() == ["a b  c d"]


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": [1.5, math.inf], "b": {"c": math.nan}})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": {"c": None}}


def application() -> typer.Typer:
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.command()
    def surprise() -> None:
        raise KeyError("a cell\nof a table")

    @app.command()
    def refuse() -> None:
        raise FedLoRAError("no")

    @app.command()
    def leave() -> None:
        raise typer.Exit(3)

    return app


def test_an_error_that_nobody_expected_is_one_sentence_and_its_traceback_is_kept(
    data_folder: Path,
) -> None:
    result = CliRunner().invoke(application(), ["surprise"])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith("Error: This was not expected: KeyError: ")
    assert "Traceback" not in result.output
    log = data_folder / "fedlora" / "errors.log"
    assert f"is in {log};" in result.output
    assert "in surprise" in log.read_text()
    assert log.parent.stat().st_mode & 0o077 == 0


def test_the_sentence_comes_even_where_no_log_can_be_kept(data_folder: Path) -> None:
    data_folder.write_text("a file where the folder should be")
    result = CliRunner().invoke(application(), ["surprise"])
    assert result.exit_code == 1
    assert "could not be written to" in result.output


def test_ends_on_purpose_keep_their_code() -> None:
    assert CliRunner().invoke(application(), ["leave"]).exit_code == 3
    refused = CliRunner().invoke(application(), ["refuse"])
    assert (refused.exit_code, refused.output) == (1, "Error: no\n")


@pytest.mark.parametrize(
    ("given", "near"), [("surp", "'surprise'"), ("leaf", "'leave'"), ("x", "")]
)
def test_a_command_that_is_not_there_is_wrong_usage_with_the_near_one(
    given: str, near: str
) -> None:
    result = CliRunner().invoke(application(), [given])
    assert result.exit_code == 2
    assert f"There is no command '{given}'." in result.output
    assert (f"Did you mean {near}?" in result.output) == bool(near)


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_progress_is_shown_to_people(terminal: bool, progress: bool | None, shown: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal)
    with counted("round", progress, console) as tell:
        tell(1, 4, "accuracy 50%")
    assert ("accuracy 50%" in stream.getvalue()) == shown
    assert ("round 1/4: accuracy 50%" in stream.getvalue()) == (shown and not terminal)
