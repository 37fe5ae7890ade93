"""Shows a comparison on a screen: progress over all runs, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from fedlora_flwr.report.scales import duration
from fedlora_flwr.studies.compare_results import Row, describe_row, seconds_left
from fedlora_flwr.studies.compare_tables import Part
from fedlora_flwr.terminal import Bar, Table, show, show_line, show_lines


class CompareScreen:
    """Shows a comparison on a console; on a plain stream, one line per finished run.

    Parameters
    ----------
    console : Console
        The console to write to.
    workers : int (default: 1)
        Runs at a time.
    """

    def __init__(self, console: Console, workers: int = 1) -> None:
        self._console = console
        self._baselines: list[str] = []
        self._bar = Bar(console, "run", remaining=True)
        self._workers = workers
        self._finished: list[Row] = []

    def __enter__(self) -> CompareScreen:
        """Show nothing before the first call of `row`, as checks may show their own progress."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the console as it was."""
        self._bar.stop()

    def baselines(self, lines: Iterable[str]) -> None:
        """Take sentences on the baselines, to be shown before the first run."""
        self._baselines = list(lines)

    def row(self, row: Row | None, done: int, total: int) -> None:
        """Show a finished run, and the time left. None says that the runs begin."""
        show_lines(self._console, [("Baselines", line) for line in self._baselines])
        self._baselines.clear()
        state = "starting" if row is None else describe_row(row)
        if self._console.is_terminal:
            self._bar.to(done, total, state)
        elif row is not None:
            self._finished.append(row)
            show_line(self._console, f"run {done}/{total}: {state}{self._left(total - done)}")

    def _left(self, runs: int) -> str:
        """Return in words about how long the other runs take, from those of this call."""
        seconds = seconds_left(self._finished, runs, self._workers)
        return f"; about {duration(seconds)} left" if seconds else ""

    def document(self, parts: Sequence[Part], folder: Path) -> None:
        """Print the finished tables with their notes, and the folder of the files."""
        for part in parts:
            if isinstance(part, str):
                show(self._console, Table((), [(part,)], "<"))
            else:
                show(self._console, Table(part[0], part[1:], "<" * len(part[0])))
            show_line(self._console, "")
        show_lines(self._console, [("Results", str(folder))])
