"""Weights & Biases, offline: files in ``wandb/`` of the run's folder; nothing is sent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora_flwr.tracking.tracker import COMPLETED, TrackedRun, figures, texts

FOLDER, PROJECT = "wandb", "fedlora"
_BEGUN, _BEFORE = "offline-run-", "before-run-"


class WandB:
    """Writes a history row per round, the configuration, and the summary.

    A run that continues writes all of its rounds again under the same identity. So its folder
    always holds one offline run, and no step twice.
    """

    def on_start(self, run: TrackedRun) -> None:
        """Begin an offline run, or write again one that continues."""
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        before = _set_aside(run.folder / FOLDER)
        self._run: Any = wandb.init(
            mode="offline",
            dir=run.folder,
            project=PROJECT,
            name=run.name,
            id=before[-1].name.rpartition("-")[2] if before else None,
            config=dict(run.config),
            reinit="create_new",  # A run that the caller has open stays as it is.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        for row in run.rows:
            self.on_round(row)
        for folder in before:
            shutil.rmtree(folder)

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Write a row of the history, with the round as the step."""
        self._run.log(figures(row), step=int(row["round"]))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, and close the offline run as finished or failed."""
        shown = {**texts(summary), **figures(summary)}
        self._run.summary.update({f"summary/{name}": value for name, value in shown.items()})
        self._run.finish(exit_code=0 if summary["status"] == COMPLETED else 1)


def _set_aside(folder: Path) -> list[Path]:
    """Rename the offline runs of a folder; return them, the one with the last identity last."""
    found = sorted(folder.glob(f"{_BEFORE}*"))
    for path in sorted(folder.glob(f"{_BEGUN}*")):
        found.append(path.rename(path.with_name(path.name.replace(_BEGUN, _BEFORE, 1))))
    return found
