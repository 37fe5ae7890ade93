"""TensorBoard, MLflow and W&B hold each round once, as the run's file has it, and send nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlora_flwr.places import holding
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.tracking.tracker import figures
from tests.server.resuming import begin, resume, tiny
from tests.tracking.support import (
    NAMES,
    History,
    Remembers,
    mlflow_run,
    of_mlflow,
    of_tensorboard,
    of_wandb,
    wandb_records,
    written,
)

READ = {"tensorboard": of_tensorboard, "mlflow": of_mlflow, "wandb": of_wandb}


def expected(run: Path) -> History:
    rows = written(run)
    return {(name, row["round"]): [v] for row in rows for name, v in figures(row).items()}


def identities(run: Path) -> tuple[str, str]:
    (folder,) = (run / "wandb").glob("offline-run-*")
    return mlflow_run(run)[1].info.run_id, folder.name.rpartition("-")[2]


def exit_codes(run: Path) -> list[int]:
    return [r.exit.exit_code for r in wandb_records(run) if r.WhichOneof("record_type") == "exit"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in round 2, which the programs have seen."""
    folder = tmp_path_factory.mktemp("tracked")
    with holding(Remembers(at=2, error=KeyboardInterrupt)) as last:
        config = tiny(folder, trackers=",".join((*NAMES, last)))
        with pytest.raises(KeyboardInterrupt):
            begin(config, folder / "run")
    return folder


def test_programs_hold_the_rounds_of_a_run_in_all_its_lives(stopped: Path) -> None:
    run, config = stopped / "run", tiny(stopped, trackers=",".join(NAMES))
    for read in READ.values():
        assert read(run) == {k: [pytest.approx(v[0])] for k, v in expected(run).items()}
    assert len(written(run)) == 3
    assert mlflow_run(run)[1].info.status == "KILLED"
    assert exit_codes(run) == [1]

    # The newest checkpoint is damaged, so round 2 is trained once more, and takes another time.
    first = identities(run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    before = written(run)[2]
    resume(config, run)
    assert written(run)[2]["seconds"] != before["seconds"]
    for name, read in READ.items():
        found = {k: [pytest.approx(v[0])] for k, v in expected(run).items()}
        assert read(run) == found, name
    again = identities(run)
    assert again[0] != first[0]  # MLflow cannot forget a step, so it has another run.
    assert again[1] == first[1]
    _, found_run = mlflow_run(run)
    assert found_run.info.status == "FINISHED"
    assert found_run.data.params["strategy"] == "rolora"
    assert found_run.data.metrics["summary/rounds_done"] == 3
    assert found_run.data.tags["end"] == "all rounds are done"
    assert exit_codes(run) == [0]

    # A run that continues once more is the same run in all of them.
    resume(config, run)
    assert identities(run) == again
    for read in READ.values():
        assert read(run) == {k: [pytest.approx(v[0])] for k, v in expected(run).items()}
    assert Checkpoints(run).last()[0].round == 3


def test_rounds_that_a_program_has_missed_are_added(tmp_path: Path) -> None:
    """A process may be killed between a checkpoint and its trackers."""
    run = tmp_path / "run"
    begin(tiny(tmp_path, num_rounds=2, epsilon=float("inf")), run)
    resume(tiny(tmp_path, num_rounds=3, epsilon=float("inf"), trackers="tensorboard,mlflow"), run)
    for read in (of_tensorboard, of_mlflow):
        assert read(run) == {k: [pytest.approx(v[0])] for k, v in expected(run).items()}
    assert len(written(run)) == 4


ALL = """
import sys
from pathlib import Path
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.trackers import trackers_of
from fedlora_flwr.tracking.tracker import TrackedRun

run = TrackedRun("run", Path(sys.argv[1]), {"epsilon": 8.0}, [])
for tracker in trackers_of(RunConfig(trackers="tensorboard,mlflow,wandb")).values():
    tracker.on_start(run)
    tracker.on_round({"round": 0, "accuracy": 0.5})
    tracker.on_end({"status": "completed"})
"""


def test_nothing_is_sent(tmp_path: Path) -> None:
    """All three send through a proxy if the environment names one. Nobody calls it."""
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                with connection:
                    calls.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        place = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        proxies = {spelled: place for name in names for spelled in (name, name.lower())}
        environment = {k: v for k, v in os.environ.items() if k.upper() != "NO_PROXY"}
        # Even where somebody's own environment asks for an upload.
        asked = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "MLFLOW_TRACKING_URI": place}
        subprocess.run(
            [sys.executable, "-c", ALL, str(tmp_path)],
            env={**environment, **proxies, **asked},
            check=True,
        )
        proxy.shutdown(socket.SHUT_RDWR)
    assert calls == []
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard", "mlflow", "wandb"}
