"""The screen of a comparison says about how long the rest takes."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from rich.console import Console

from fedlora_flwr.cli.compare_screen import CompareScreen

ROW: Any = {
    "phase": "report", "row": "rolora", "epsilon": 8.0, "seed": 1, "error": "", "final": 0.5,
    "seconds": 60.0,
}  # fmt: skip
FAILED: Any = {**ROW, "error": "no"}


def test_the_time_left_is_that_of_the_finished_runs_and_only_of_this_call() -> None:
    out = StringIO()
    with CompareScreen(Console(file=out, width=200), workers=2) as screen:
        screen.row(None, 5, 10)  # Five runs are done by an earlier call.
        screen.row(FAILED, 6, 10)
        screen.row(ROW, 7, 10)
        screen.row(ROW, 8, 10)
        screen.row(ROW, 10, 10)
    left = [re.sub(r".*(in \d+ s|failed.*)", "", line) for line in out.getvalue().splitlines()]
    assert left == [
        "",
        "; about 90 s left",
        "; about 60 s left",
        "",
    ]


def test_the_bar_follows_the_number_of_runs() -> None:
    out = StringIO()
    with CompareScreen(Console(file=out, width=200, force_terminal=True)) as screen:
        screen.row(None, 0, 12)
        screen.row(ROW, 4, 9)
    assert "4/9" in out.getvalue()
