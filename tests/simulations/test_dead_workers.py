"""A Ray worker that is killed: its client is reported, and the run goes on or stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.launch import open_run
from fedlora_flwr.simulations.runner import RunFailed, prepare_run, run_in_process, run_on_flower
from tests.server.resuming import assert_same

pytestmark = pytest.mark.flower

# One worker dies, once, in the first step after the server has written round 1's row.
MORTAL = """
import os, signal
from pathlib import Path
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.tasks.digits import DigitsTask

ARMED = Path({armed!r})
RUN = RunDirectory(Path({run!r}))

class Mortal(DigitsTask):
    def losses(self, model, batch):
        if ARMED.exists() and any(row["round"] == 1 for row in RUN.rows("rounds")):
            try:
                ARMED.rename(ARMED.with_name("fired"))
            except FileNotFoundError:
                pass  # the other worker was first
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)
"""
SETTINGS: dict[str, Any] = {
    "task": "mortal:Mortal",
    "num-clients": 4,
    "num-rounds": 3,
    "local-steps": 2,
    "reproducible": True,
}


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Arm the task of a run in ``run``; return the file that says so."""
    armed = tmp_path / "armed"
    (tmp_path / "mortal.py").write_text(MORTAL.format(armed=str(armed), run=str(tmp_path / "run")))
    armed.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return armed


def test_a_killed_worker_costs_one_client_one_round(armed: Path, tmp_path: Path) -> None:
    run_dir, shown = RunDirectory(tmp_path / "run"), list[int]()
    prepared = prepare_run(RunConfig.of(SETTINGS))
    summary = run_on_flower(prepared, run_dir, lambda row: shown.append(row["round"]), workers=2)

    # Returns only if Flower's own status is "finished:completed".
    assert summary["status"] == "completed"
    assert shown == [0, 1, 2, 3]
    assert not armed.exists()
    first, second, third = run_dir.rounds()[1:]
    assert not first["failures"]
    (line,) = second["failures"]
    assert line.endswith(": its worker process died: killed, or out of memory")
    assert second["clients_used"] == 3
    # The dead worker takes no client of a later round.
    assert third["clients_used"] == 4


def test_a_run_that_ends_with_a_worker_goes_on_bit_for_bit(armed: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    config = RunConfig.of(SETTINGS, {"min-completion": 1.0})
    ended = r"Round 2: 3 of 4 clients answered.*partition-00000\d: its worker process died"
    with pytest.raises(RunFailed, match=ended):
        run_on_flower(prepare_run(config), run, lambda _: None, workers=2)
    assert not armed.exists()
    again = RunConfig.of(config.items(), {"resume": str(run.path)})
    open_run(again, tmp_path).play(lambda _: None)

    whole = RunDirectory(tmp_path / "whole")
    run_in_process(prepare_run(config), whole, lambda _: None)
    # The client that was lost has spent its round once: the ledger, too, is the same.
    assert_same(whole.path, run.path)
