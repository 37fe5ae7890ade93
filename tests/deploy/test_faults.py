"""What real SuperNodes do to a run: one is late, one is killed and comes back, two clients fail."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks.running_fleet import RunningFleet, running
from fedlora_flwr.config import RunConfig
from fedlora_flwr.server.run_dir import RunDirectory
from tests.deploy import faulty
from tests.deploy.support import own_cache, prepare_faulty, until

pytestmark = pytest.mark.deploy

LATE, KILLED, FAILING, SOUND = NAMES = [f"device-0{number}" for number in (1, 2, 3, 4)]
STEPS = 2
# Flower takes a minute to notice that a node or a client's process is gone.
TIMEOUT = 150.0


@dataclass
class Story:
    """What is left when all has happened."""

    said: str
    server: str
    device: str
    refused: str
    run_dir: RunDirectory
    ledgers: dict[str, list[int]]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.run_dir.rows("rounds")

    def used(self, server_round: int) -> dict[str, dict[str, Any]]:
        rows = self.run_dir.rows("clients")
        return {row["client"]: row for row in rows if row["round"] == server_round}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    base = tmp_path_factory.mktemp("faults")
    with own_cache(base):
        config = prepare(base)
        with running(base / "fleet", base / "operator", []) as fleet:
            yield Scene(base, fleet, RunDirectory(base / "run")).play(config)


def prepare(base: Path) -> RunConfig:
    config = prepare_faulty(
        base, NAMES, 30 * len(NAMES), local_steps=STEPS, min_clients=3, round_timeout=TIMEOUT,
        reproducible=False,
    )  # fmt: skip
    file = base / "fleet" / "devices" / FAILING / "device.toml"
    # Flower's own process is what is killed there.
    settings = file.read_text().replace("keep-warm = 600", "keep-warm = 0")
    assert "keep-warm = 0" in settings
    file.write_text(settings)
    return config


@dataclass
class Scene:
    """Four devices, each with a folder that says what goes wrong on it."""

    base: Path
    fleet: RunningFleet
    run_dir: RunDirectory

    def play(self, config: RunConfig) -> Story:
        said: list[str] = []
        for name in NAMES:
            self.start(name)
        follow = Thread(target=lambda: said.append(self.fleet.run(config, 900)), daemon=True)
        follow.start()
        self.after_round(1)
        self.tell(LATE, faulty.HANG)
        self.tell(KILLED, faulty.HANG)
        self.tell(FAILING, faulty.KILL)
        self.wait_for(self.base / KILLED / faulty.HANGING)
        refused = self.kill_supernode()
        # It has answered, and is slow from the next round on. Its row says that it has begun.
        self.until(lambda: self.fleet.log(SOUND).read_text().count("Sent successfully") >= 2)
        self.tell(SOUND, faulty.HANG)
        self.after_round(2)
        self.tell(FAILING, faulty.RAISE)
        self.untell(LATE, faulty.HANG)
        self.untell(KILLED, faulty.HANG)
        self.start(KILLED)
        self.until(lambda: self.fleet.online() == set(NAMES))
        self.untell(SOUND, faulty.HANG)
        self.after_round(3)
        self.untell(FAILING, faulty.RAISE)
        follow.join()
        return Story(
            said[0],
            self.fleet.log("server").read_text(),
            self.fleet.log(FAILING).read_text(),
            refused,
            self.run_dir,
            {name: self.ledger(name) for name in NAMES},
        )

    def kill_supernode(self) -> str:
        """Kill a SuperNode alone, start it again at once, and return what it says."""
        supernode = self.fleet.processes[KILLED]
        os.kill(supernode.pid, signal.SIGKILL)
        supernode.wait()
        self.fleet.stop([KILLED])
        self.fleet.log(KILLED).unlink()
        again = self.start(KILLED)
        assert again.wait(60) != 0
        self.fleet.stop([KILLED])
        return self.fleet.log(KILLED).read_text()

    def start(self, name: str) -> Any:
        return self.fleet.start(name, **{faulty.FOLDER: str(self.base / name)})

    def tell(self, name: str, fault: str) -> None:
        (self.base / name / fault).touch()

    def untell(self, name: str, fault: str) -> None:
        (self.base / name / fault).unlink()

    def after_round(self, number: int) -> None:
        self.until(lambda: (self.run_dir.path / "rounds.jsonl").exists())
        self.until(lambda: len(self.run_dir.rows("rounds")) > number)

    def wait_for(self, path: Path) -> None:
        self.until(path.exists)

    def until(self, done: Callable[[], bool]) -> None:
        until(done, self.fleet.log("server").read_text)

    def ledger(self, name: str) -> list[int]:
        path = self.base / "fleet" / "devices" / name / "state" / "ledger.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return [row[0] for row in db.execute("SELECT round FROM releases ORDER BY id")]


def test_the_run_goes_on_to_its_end(story: Story) -> None:
    summary = story.run_dir.summary()
    assert summary is not None, story.said
    assert (summary["status"], summary["rounds_done"]) == ("completed", 4)
    assert summary["num_clients"] == 4
    assert summary["failures"] == 4


def test_each_device_spends_its_own_budget_and_not_the_runs(story: Story) -> None:
    summary = story.run_dir.summary()
    assert summary is not None
    assert {row["client"] for row in story.run_dir.rows("clients")} == set(NAMES)
    assert 0 < summary["epsilon_max"] <= 3.0
    assert (summary["epsilon_budget"], summary["delta"]) == (3.0, 1e-3)


def test_the_server_keeps_which_key_each_identity_is_bound_to(story: Story) -> None:
    kept = story.run_dir.path.parent / "fleet" / "server" / "identities.json"
    bound = json.loads(kept.read_text())
    assert set(bound) == set(NAMES)
    assert len(set(bound.values())) == len(NAMES)
    # Nobody else reads that, nor the database in which uploads wait.
    for file in (kept, kept.with_name("state.sqlite")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_client_of_a_round_is_used_or_a_failure(story: Story) -> None:
    for row in story.rounds[1:]:
        assert row["clients_used"] + len(row["failures"]) == row["clients_asked"]
    assert [row["clients_asked"] for row in story.rounds[1:]] == [4, 4, 3, 4]
    assert [row["clients_absent"] for row in story.rounds[1:]] == [0, 1, 0, 0]


def test_failures_name_the_device_and_what_happened(story: Story) -> None:
    lines = [row["failures"] for row in story.rounds[1:]]
    shown = [[re.sub(r"error [0-9a-f]{8}", "error …", line) for line in found] for found in lines]
    assert shown == [
        [],
        [
            f"{LATE}: no reply in time",
            f"{KILLED}: Error: Node Unavailable — The destination node failed to report a "
            "heartbeat within 2 × its expected interval.",
            f"{FAILING}: ClientApp stopped responding.",
        ],
        [f"{FAILING}: The client could not do what was asked (error …). Its own log says why."],
        [],
    ]
    for line in (line for found in lines for line in found):
        assert line in story.said
    assert f"1 of 4 nodes are not connected any more: {KILLED}." in story.said


def test_what_a_library_says_of_a_record_stays_on_the_device(story: Story) -> None:
    written = [path.read_text() for path in story.run_dir.path.glob("*.json*")]
    assert not any("Jane Doe" in text for text in (story.said, story.server, *written))
    assert "Jane Doe" in story.device


def test_a_killed_supernode_is_refused_for_a_minute_and_is_asked_again_after(story: Story) -> None:
    assert "[code: 2004] Failed to activate SuperNode." in story.refused
    assert [KILLED in story.used(number) for number in (1, 2, 3, 4)] == [True, False, False, True]


def test_a_late_reply_is_in_the_ledger_and_in_no_average(story: Story) -> None:
    assert story.ledgers[LATE] == [1, 2, 3, 4]
    assert [LATE in story.used(number) for number in (1, 2, 3, 4)] == [True, False, True, True]
    # What counts in the third round is that round's own answer.
    assert story.used(3)[LATE]["steps"] == 3 * STEPS


def test_a_client_that_fails_after_its_row_has_spent_the_round(story: Story) -> None:
    assert story.ledgers[SOUND] == story.ledgers[FAILING] == [1, 2, 3, 4]
    assert story.ledgers[KILLED] == [1, 2, 4]
    assert story.used(4)[FAILING]["steps"] == 4 * STEPS
