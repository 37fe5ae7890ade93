"""MLflow: a file store in ``mlflow/`` of the run's folder, without MLflow's telemetry."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from fedlora_flwr.tracking.tracker import COMPLETED, TrackedRun, figures, texts

FOLDER, EXPERIMENT = "mlflow", "fedlora"
_STATUS = {COMPLETED: "FINISHED", "interrupted": "KILLED"}
_MOST_PARAMETERS = 100  # Per call of MLflow.
_NOT_IN_A_NAME = re.compile(r"[^\w\-. /:]", re.ASCII)


class MLflow:
    """Writes a metric per figure, a parameter per key, and the end as status and tags.

    If a training run is resumed, its MLflow run is resumed, too, and gets the rounds that it lacks.
    The MLflow run may have rounds that the checkpoint does not have. It is then marked as deleted,
    and a new one gets the checkpoint's rounds.
    """

    def on_start(self, run: TrackedRun) -> None:
        """Begin an MLflow run, or continue it."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # MLflow 3 accepts a folder only with this word. A database needs many more packages.
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=(run.folder / FOLDER).as_uri())
        known = self._client.get_experiment_by_name(EXPERIMENT)
        place = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        self._there: set[tuple[str, int]] = set()
        self._run = ""
        begun = self._client.search_runs([place], order_by=["attributes.start_time DESC"])
        if begun:
            self._take_up(begun[0])
            if any(step > run.last for _, step in self._there):
                self._client.delete_run(self._run)
                begun, self._there = [], set()
        if not begun:
            self._run = self._client.create_run(place, run_name=run.name).info.run_id
            self._parameters(run.config)
        for row in run.rows:
            self.on_round(row)

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Write a metric per figure, with the round as the step."""
        self._metrics(figures(row), row["round"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary's figures and texts, and the status."""
        for name, text in texts(summary).items():
            self._client.set_tag(self._run, name, text)
        shown = {f"summary/{name}": value for name, value in figures(summary).items()}
        self._metrics(shown, int(summary.get("rounds_done") or 0))
        self._client.set_terminated(self._run, _STATUS.get(summary["status"], "FAILED"))

    def _take_up(self, begun: Any) -> None:
        self._run = begun.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        for name in begun.data.metrics:
            history = self._client.get_metric_history(self._run, name)
            self._there.update((name, entry.step) for entry in history)

    def _metrics(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers, each once per step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {_NOT_IN_A_NAME.sub("_", name): value for name, value in numbers.items()}
        new = {name: value for name, value in named.items() if (name, step) not in self._there}
        metrics = [Metric(name, value, now, step) for name, value in new.items()]
        self._client.log_batch(self._run, metrics=metrics)
        self._there.update((name, step) for name in new)

    def _parameters(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        every = (Param(key, str(value)) for key, value in config.items())
        while part := list(islice(every, _MOST_PARAMETERS)):
            self._client.log_batch(self._run, params=part)
