"""A Ray worker that is killed: each lost reply is reported, and the run goes on or stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import RunFailed, prepare_run, run_on_flower

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


@pytest.mark.parametrize("completion", [0.1, 1.0])
def test_a_killed_worker_is_reported_in_every_round_that_it_shrinks(
    completion: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed, run_dir = tmp_path / "armed", RunDirectory(tmp_path / "run")
    (tmp_path / "mortal.py").write_text(MORTAL.format(armed=str(armed), run=str(run_dir.path)))
    armed.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig.of(
        {
            "task": "mortal:Mortal",
            "num-clients": 4,
            "num-rounds": 3,
            "local-steps": 2,
            "min-completion": completion,
            "reproducible": True,
        }
    )
    if completion == 1.0:
        with pytest.raises(RunFailed, match=r"of 4 clients answered.*worker process died"):
            run_on_flower(prepare_run(config), run_dir, lambda _: None, workers=2)
        return
    shown: list[int] = []
    summary = run_on_flower(
        prepare_run(config), run_dir, lambda row: shown.append(row["round"]), workers=2
    )

    # Returns only if Flower's own status is "finished:completed".
    assert summary["status"] == "completed"
    assert shown == [0, 1, 2, 3]
    assert (tmp_path / "fired").exists()
    rows = run_dir.rows("rounds")[1:]
    assert len(rows) == 3
    for row in rows:
        assert row["clients_used"] + len(row["failures"]) == row["clients_asked"] == 4
        assert all("worker process died" in line for line in row["failures"])
    assert not rows[0]["failures"]
    assert sum(len(row["failures"]) for row in rows) == summary["failures"] > 0
