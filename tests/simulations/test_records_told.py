"""Records that are left out are counted on the screen, in the log and by ``inspect-split``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.client_app import _private_records
from fedlora_flwr.config import RunConfig
from fedlora_flwr.tasks.registry import build_task, reading
from tests.tasks.texts import make_checkpoint, text_config

TRAIN = "train: 60 of 81 records, read from 'text'; left out: 20 with nothing in 'label'"
EMPTY = "train: records without text in 'text', read as an empty text: 1"
VALID = "validation: 6 of 6 records, read from 'text'"


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """Give back Flower's logger as it was: a run sends it to its own file."""
    logger = logging.getLogger("flwr")
    before, passed = list(logger.handlers), logger.propagate
    yield
    logger.handlers[:], logger.propagate = before, passed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a run on a table with words such as None, a column too many, and gaps."""
    folder = tmp_path_factory.mktemp("told")
    rows = [
        *(f"x{i},None,{('NA', 'yes')[i % 2]}" for i in range(60)),
        *(f"y{i},fine," for i in range(20)),
    ]
    (folder / "train.csv").write_text("\n".join(["id,text,label", *rows, "z,,NA"]))
    (folder / "validation.csv").write_text("\n".join(["id,text,label", *rows[:6]]))
    return text_config(
        make_checkpoint("bert", folder / "model"), folder, num_clients=2, batch_size=8,
        local_steps=1, num_rounds=1, delta=1e-3, min_records=1, train_limit=60, max_length=8,
    )  # fmt: skip


def test_screen_log_and_table_tell_the_same(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run.toml").write_text(config.to_toml())
    shared = (
        "validation: warning: 59 of the 60 records of 'train' are in this split, too, so its "
        "figures are too good. Take them out of one of the two"
    )
    told = [f"{TRAIN}, 1 beyond the limit", EMPTY, VALID, shared]

    run = ["simulate", str(tmp_path / "run.toml"), "-c", f"run-dir={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    for line in told:
        assert f"Records   {line}" in done.output.splitlines()
    logs = "".join(path.read_text() for path in (tmp_path / "run").glob("*.log"))
    for line in told:
        assert f"INFO {line}\n" in logs

    table = ["inspect-split", str(tmp_path / "run.toml"), "--output", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, table)
    assert done.exit_code == 0, done.output
    shown = [line for line in done.output.splitlines() if line.startswith("Records   ")]
    assert [line.removeprefix("Records   ") for line in shown] == told


def test_records_that_no_client_gets_are_counted(config: RunConfig) -> None:
    spread = {"partitioner": "size", "partition-sizes": "20,30", "train-limit": 0}
    changed = RunConfig.of(config.items(), spread)
    (train, *_) = reading(build_task(changed.task, changed), 2)
    assert train.startswith("train: 50 of 81 records")
    assert train.endswith("; left out: 20 with nothing in 'label', 11 that no client gets")


def test_a_device_tells_its_own_log(
    config: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.INFO):
        records = _private_records(build_task(config.task, config))
    assert len(records) == 60
    assert caplog.messages[0] == f"{TRAIN}, 1 beyond the limit"
