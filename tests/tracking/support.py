"""What the three programs hold after a run, read from their files, and trackers of a test's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora_flwr.tracking.tracker import TrackedRun

NAMES = ("tensorboard", "mlflow", "wandb")
History = dict[tuple[str, int], list[float]]
"""The values of each figure and round."""


def written(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's own file."""
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def of_tensorboard(run: Path) -> History:
    """Return the scalars of a run's event files, as TensorBoard loads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: History = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def mlflow_run(run: Path) -> tuple[Any, Any]:
    """Return MLflow's client and the only run in a folder that is not deleted."""
    # A reader in another process than the run's has to allow a folder itself.
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("fedlora")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def of_mlflow(run: Path) -> History:
    """Return the metrics of MLflow's run, those of the summary aside."""
    client, found = mlflow_run(run)
    values: History = {}
    for name in found.data.metrics:
        for entry in client.get_metric_history(found.info.run_id, name):
            if not name.startswith("summary/"):
                values.setdefault((name, entry.step), []).append(entry.value)
    return values


def wandb_records(run: Path) -> Iterator[Any]:
    """Yield the records of the only offline run: a log in LevelDB's format of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # No header fits into the rest of a block.
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A whole record, or the last part of one.
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined,unused-ignore]
            record.ParseFromString(whole)
            yield record
            whole = b""


def of_wandb(run: Path) -> History:
    """Return the rows of the history of W&B's offline run."""
    found: History = {}
    for record in wandb_records(run):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            if not name.startswith("_"):
                found.setdefault((name, int(row["_step"])), []).append(value)
    return found


class Remembers:
    """Keeps all that it is told, and fails or stops the run where a test wants it."""

    def __init__(self, at: int = -1, error: type[BaseException] = OSError) -> None:
        self.at, self.error = at, error
        self.runs: list[TrackedRun] = []
        self.rows: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []

    def on_start(self, run: TrackedRun) -> None:
        self.runs.append(run)

    def on_round(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        if row["round"] == self.at:
            raise self.error("the disk is full")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.ends.append(dict(summary))


class Unfinished:
    """Is no tracker, as it is told of rounds alone."""

    def on_round(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""
