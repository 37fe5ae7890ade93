"""A client's process is killed at each point of a round: what was released is in the ledger."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import stated
from fedlora_flwr.privacy.budget import Segment, epsilon_spent
from fedlora_flwr.privacy.ledger import Account, Ledger
from tests.backbones.checkpoints import write_split
from tests.deploy.dying import NEVER, POINTS, REPLIED
from tests.tasks.texts import make_checkpoint, reviews, text_config

pytestmark = pytest.mark.deploy

REPOSITORY = Path(__file__).parents[2]
STEPS, DELTA = 2, 1e-3
JOURNAL = bytes.fromhex("d9d505f920a163d7")  # How SQLite's journal of an open transaction begins.
# What a ledger holds of the round. More than what left is a loss of budget; less would be a lie.
ROWS = {
    "before the row": 0,
    "in the ledger's transaction": 0,
    "before training": 1,
    "after a step": 1,
    "after the row": 1,
    "with all written": 1,
    REPLIED: 1,
}


@dataclass
class Killed:
    """A device whose process was killed, and its next round in a fresh one."""

    folder: Path
    status: int
    released: int
    rows: int
    hot: bool
    kept: int
    next_round: dict[str, float]


def serve(run_id: int, run: Path, points: Mapping[Path, str]) -> list[list[dict[str, Any]]]:
    """Return the lines that each device's process has printed, and one on its end."""
    jobs = [f"{device}={point}" for device, point in points.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.dying", str(run_id), run, *jobs],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: list[list[dict[str, Any]]] = [[]]
    for line in map(json.loads, done.stdout.splitlines()):
        told[-1].append(line)
        if "ended" in line:
            told.append([])
    assert len(told) == len(jobs) + 1, done.stderr
    return told[:-1]


def segments(folder: Path) -> list[Segment]:
    """Read a ledger as anybody can, without our code."""
    path = folder / "state" / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = db.execute("SELECT noise_multiplier, sample_rate, steps FROM releases").fetchall()
    return [Segment(*row) for row in rows]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Killed]]:
    base = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        model = make_checkpoint("bert", base / "model")
        write_split(base / "data", "train", reviews(60))
        config = text_config(
            model, base / "data", input_columns="text", batch_size=8, local_steps=STEPS,
            num_classes=2, num_rounds=4, delta=DELTA, reproducible=False,
        )  # fmt: skip
        (base / "run.toml").write_text(config.to_toml())
        yield walk(base, config)


def walk(base: Path, config: RunConfig) -> dict[str, Killed]:
    """Kill a device's process at each point, then serve every device in a fresh one."""
    files = {}
    for point in ROWS:
        folder = base / point.replace(" ", "-")
        folder.mkdir()
        files[point] = folder / "device.toml"
        files[point].write_text(
            f'client-id = "{folder.name}"\ndataset = "../data"\nstate-dir = "state"\n'
            f"epsilon = 8.0\ndelta = {DELTA}\n{stated(config)}"
        )
    run, devices = base / "run.toml", list(files.values())
    first = serve(1, run, {file: point for point, file in files.items()})
    left = [seen(file.parent) for file in devices]
    second = serve(1, run, dict.fromkeys(devices, NEVER))
    return {
        point: Killed(file.parent, told[-1]["ended"], len(told) - 1, *found, answer[0])
        for (point, file), told, found, answer in zip(
            files.items(), first, left, second, strict=True
        )
    }


def seen(folder: Path) -> tuple[int, bool, int]:
    """Return rows, whether a transaction is on the disk, and kept files: what a process left."""
    hot = has_open_transaction(folder)
    kept = len(list((folder / "state" / "local").glob("*.safetensors")))
    return len(segments(folder)), hot, kept


def has_open_transaction(folder: Path) -> bool:
    journal = folder / "state" / "ledger.sqlite-journal"
    return journal.exists() and journal.read_bytes().startswith(JOURNAL)


def test_every_point_is_walked() -> None:
    assert {*ROWS, NEVER} == set(POINTS)


@pytest.mark.parametrize("point", ROWS)
def test_a_killed_clients_ledger_holds_what_it_released(
    killed: dict[str, Killed], point: str
) -> None:
    one = killed[point]
    assert one.status == -signal.SIGKILL
    assert one.released == (point == REPLIED)
    assert one.rows == ROWS[point]
    assert one.rows >= one.released
    # What a later upload depends on is written after the row.
    assert one.rows >= one.kept


@pytest.mark.parametrize("point", ROWS)
def test_a_fresh_process_composes_what_was_written_with_its_own_round(
    killed: dict[str, Killed], point: str
) -> None:
    one, spent = killed[point], segments(killed[point].folder)
    assert len(spent) == ROWS[point] + 1
    assert one.next_round["steps"] == sum(segment.steps for segment in spent)
    assert one.next_round["steps"] == STEPS * len(spent)
    (sigma,), (rate,) = {s.noise_multiplier for s in spent}, {s.sample_rate for s in spent}
    exact = epsilon_spent([Segment(sigma, rate, STEPS * len(spent))], DELTA).epsilon
    assert one.next_round["epsilon"] == pytest.approx(exact, rel=1e-9)


def test_a_transaction_was_on_the_disk_and_is_rolled_back(killed: dict[str, Killed]) -> None:
    one = killed["in the ledger's transaction"]
    assert one.hot
    assert not has_open_transaction(one.folder)
    assert one.rows == 0
    assert not any(other.hot for other in killed.values() if other is not one)


def record_for_ever(path: Path, account: Account, told: int) -> NoReturn:
    ledger = Ledger(path)
    while True:
        ledger.record(account, 1, Segment(0.0, 0.1, 1), Segment(0.0, 0.1, 1))
        os.write(told, b".")


def test_kills_at_any_time_lose_no_row_that_was_told(tmp_path: Path) -> None:
    account = Account("ward", "run", float("inf"), DELTA)
    path, kills, told = tmp_path / "ledger.sqlite", 12, 0
    for attempt in range(kills):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            record_for_ever(path, account, writer)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            told += len(pipe.read(1))
            time.sleep(0.007 * attempt)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told += len(pipe.readall())
        # A row that was killed before it was told may be there, and no more than that.
        assert told <= Ledger(path).summary(account).steps <= told + attempt + 1
    assert told > kills
