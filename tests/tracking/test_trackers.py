"""Trackers are told what the run's own files hold, by the server alone, and end no run."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedlora_flwr import errors, simulate
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.on_device import device_config
from fedlora_flwr.errors import InvalidValue, NotInstalled
from fedlora_flwr.places import holding
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.tracking.tracker import figures
from tests.hostile.tiny_task import NAME as TASK
from tests.server.resuming import begin, resume, tiny
from tests.tracking.support import Remembers, written

STILL = {"lr_a": 1e-9, "lr_b": 1e-9, "lr_head": 1e-9}


def test_a_tracker_is_told_the_rows_and_the_summary_of_the_folder(tmp_path: Path) -> None:
    mine = Remembers()
    with holding(mine) as name:
        begin(tiny(tmp_path, trackers=name, epsilon=float("inf")), tmp_path / "run")
    (run,) = mine.runs
    assert (run.name, run.folder, run.last) == ("run", tmp_path / "run", -1)
    assert run.config["epsilon"] == float("inf")
    assert mine.rows == written(tmp_path / "run")
    assert mine.rows[1]["epsilon_max"] is None  # As JSON has it.
    assert mine.ends == [RunDirectory(tmp_path / "run").summary()]
    assert mine.ends[0]["status"] == "completed"


def test_no_path_no_peer_and_no_name_of_a_client_is_written(tmp_path: Path) -> None:
    mine = Remembers()
    with holding(mine) as name:
        begin(tiny(tmp_path, trackers=name, num_rounds=1), tmp_path / "run")
    config = mine.runs[0].config
    assert config["dataset"] == "…/private.npy"
    assert str(tmp_path) not in str(config)
    assert not {"peers", "state-dir", "run-dir"} & config.keys()
    told = {"failures": ["ann: late"], "suspects": {"ann": 2}, "best": {"round": 3}, "error": "ann"}
    assert figures(told) == {"failures": 1.0, "suspects": 1.0, "best/round": 3.0}


def test_a_tracker_that_fails_ends_no_run_and_is_told_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good, plain = Remembers(at=1), Remembers(), tmp_path / "plain"
    begin(tiny(tmp_path), plain)
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)
    with holding(bad) as first, holding(good) as second:
        summary = begin(tiny(tmp_path, trackers=f"{first},{second}"), tmp_path / "run")
    flower.removeHandler(caplog.handler)
    assert summary["status"] == "completed"
    assert summary["remarks"][f"tracker {first}"].startswith("failed in round 1 and")
    lines = {message for message in caplog.messages if message.startswith("The tracker")}
    assert lines == {f"The tracker {first} failed in round 1. The run continues."}
    assert ([row["round"] for row in bad.rows], len(bad.ends)) == ([0, 1], 1)
    assert ([row["round"] for row in good.rows], len(good.ends)) == ([0, 1, 2, 3], 1)
    timed = {"seconds"}
    with_, without = (
        [{k: v for k, v in row.items() if k not in timed} for row in written(folder)]
        for folder in (tmp_path / "run", plain)
    )
    assert with_ == without


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted")]
)
def test_an_aborted_run_is_told_as_such_and_continues_with_its_rounds(
    error: type[BaseException], status: str, tmp_path: Path
) -> None:
    mine, later = Remembers(at=2, error=error), Remembers()
    with holding(mine) as name, pytest.raises(error):
        begin(tiny(tmp_path, trackers=name), tmp_path / "run")
    assert [end["status"] for end in mine.ends] == [status]
    with holding(later) as name:
        resume(tiny(tmp_path, trackers=name), tmp_path / "run")
    assert [row["round"] for row in later.runs[0].rows] == [0, 1, 2]
    assert later.runs[0].last == 2
    assert [row["round"] for row in later.rows] == [3]


def test_a_run_that_fails_before_its_first_round_has_an_end(tmp_path: Path) -> None:
    mine = Remembers()
    with holding(mine) as name, pytest.raises(InvalidValue):
        begin(tiny(tmp_path, trackers=name, lora_targets="nothing"), tmp_path / "run")
    assert (len(mine.runs), mine.rows) == (1, [])
    assert [end["status"] for end in mine.ends] == ["failed"]


def test_an_early_end_is_told(tmp_path: Path) -> None:
    mine, changes = Remembers(), {"num_rounds": 9, "early_stopping_patience": 1, **STILL}
    with holding(mine) as name:
        begin(tiny(tmp_path, trackers=name, **changes), tmp_path / "run")
    (end,) = mine.ends
    assert (end["status"], end["rounds_done"]) == ("completed", len(mine.rows) - 1)
    assert end["rounds_done"] < 9


@pytest.mark.parametrize(
    ("trackers", "sentence"),
    [
        ("tests.tracking.support:Unfinished", "which has on_start, on_round and on_end"),
        ("tests.tracking.support:Absent", "has no 'Absent'"),
        ("tests.tracking.nothing:Mine", "is not a module"),
    ],
)
def test_what_is_no_tracker_is_told_before_a_folder_is_taken(
    trackers: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidValue, match=sentence):
        begin(tiny(tmp_path, trackers=trackers), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_package_that_is_missing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        errors, "find_spec", lambda name: None if name == "mlflow" else find_spec(name)
    )
    with pytest.raises(NotInstalled, match=r"^mlflow is not installed.*fedlora-flwr\[mlflow\]'"):
        simulate(RunConfig(trackers="tensorboard,mlflow"), output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_objects_and_names_are_given_in_python(tmp_path: Path) -> None:
    mine, config = Remembers(), tiny(tmp_path / "data", num_rounds=1)
    found = simulate(config, trackers=[mine, Remembers, "tensorboard"], output=tmp_path / "runs")
    assert [row["round"] for row in mine.rows] == [0, 1]
    assert found.config.trackers == "tensorboard"  # A file cannot hold the others.
    with pytest.raises(InvalidValue, match="because tracker was given as an object"):
        simulate(config, trackers=[Remembers()], engine="flower", output=tmp_path / "runs")


def test_no_device_and_no_client_loads_a_tracker(tmp_path: Path) -> None:
    """A server is the attacker: it may send any text as the value of the key."""
    sent = {"task": TASK, "trackers": "tests.tracking.trap:Trap"}
    assert device_config(sent, {"task": TASK}).trackers == ""
    # A simulated client keeps the text, and nothing that a client runs reads it.
    assert RunConfig.received(sent).trackers == "tests.tracking.trap:Trap"
    assert "tests.tracking.trap" not in sys.modules
    clients = Path(errors.__file__).parent
    for source in [clients / "client_app.py", *(clients / "clients").rglob("*.py")]:
        assert "tracker" not in source.read_text(encoding="utf-8")
