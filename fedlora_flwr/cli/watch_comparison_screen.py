"""What ``fedlora watch`` shows of a comparison: its rows, and how far each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlora_flwr.cli.watch_page import RELOAD
from fedlora_flwr.cli.watch_screen import plain
from fedlora_flwr.report.scales import duration
from fedlora_flwr.studies.compare_results import budget_name, describe_row
from fedlora_flwr.studies.progress import FollowedComparison, study_page
from fedlora_flwr.terminal import Table

HEADS = ("row", "ε", "done", "failed", "running", "left", "mean")


class WatchedComparison:
    """A comparison, read from its folder.

    Parameters
    ----------
    folder : Path
        The comparison's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._followed = folder, FollowedComparison(folder)

    def news(self) -> Iterator[str]:
        """Yield a line on each run that has ended since the last call."""
        new = self._followed.new_rows()
        before = len(self._followed.rows) - len(new)
        for count, row in enumerate(new, start=max(before, 0) + 1):
            yield plain(f"run {count}/{self._followed.total}: {describe_row(row)}")

    def lines(self, width: int | None) -> list[str]:
        """Return the lines that show the comparison as it is now."""
        return [plain(line) for line in (self._state(), "", *self._table().lines(width))]

    def closing(self) -> list[str]:
        """Return the lines that show the comparison, of any width."""
        return self.lines(None)

    def ending(self) -> str | None:
        """Return in words how the comparison has ended, or None while it goes on."""
        return self._followed.ending()

    def page(self) -> str:
        """Return the comparison's report, which reloads while it goes on."""
        return study_page(self._folder, RELOAD if self.ending() is None else None)

    def _state(self) -> str:
        followed = self._followed
        state = f"{len(followed.rows)} of {followed.total} runs are done"
        if count := len(followed.running):
            state += f", {count} {'is' if count == 1 else 'are'} running"
        seconds = followed.seconds_left
        if seconds and len(followed.rows) < followed.total:
            state += f", about {duration(seconds)} left"
        return state

    def _table(self) -> Table:
        rows = [
            (
                one.row, budget_name(one.epsilon), str(one.done), str(one.failed),
                str(one.running), str(one.left), "–" if one.mean is None else f"{one.mean:.1%}",
            )
            for one in self._followed.pairs()
        ]  # fmt: skip
        return Table(HEADS, rows, "<" + ">" * (len(HEADS) - 1))
