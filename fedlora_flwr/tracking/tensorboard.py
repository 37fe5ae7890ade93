"""TensorBoard: event files in ``tensorboard/`` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_flwr.tracking.tracker import TrackedRun, figures, texts

FOLDER = "tensorboard"


class TensorBoard:
    """Writes a scalar per figure, and the configuration and the end as text.

    A run that continues adds event files. They tell TensorBoard to forget steps that come after
    the last round that is done.
    """

    def on_start(self, run: TrackedRun) -> None:
        """Open an event file, and write the rounds that are missing."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        there = _written(folder)
        self._writer: Any = SummaryWriter(str(folder), purge_step=run.last + 1 if there else None)
        if not there:
            self._text("config", run.config, 0)
        for row in run.rows:
            self._write(row, there)

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Write a scalar per figure."""
        self._write(row, set())

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as text, and close the file."""
        shown = {**texts(summary), **figures(summary)}
        self._text("summary", shown, int(summary.get("rounds_done") or 0))
        self._writer.close()

    def _write(self, row: Mapping[str, Any], there: set[tuple[str, int]]) -> None:
        for name, value in figures(row).items():
            if (name, row["round"]) not in there:
                self._writer.add_scalar(name, value, row["round"])
        self._writer.flush()

    def _text(self, name: str, shown: Mapping[str, Any], step: int) -> None:
        """Write a table of names and values in Markdown, which TensorBoard shows."""
        lines = [f"| `{key}` | `{value}` |" for key, value in shown.items()]
        self._writer.add_text(name, "\n".join(["| | |", "|---|---|", *lines]), step)
        self._writer.flush()


def _written(folder: Path) -> set[tuple[str, int]]:
    """Return name and step of each scalar that event files hold."""
    if not folder.is_dir():
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {(tag, e.step) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
