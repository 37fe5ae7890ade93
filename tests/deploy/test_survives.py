"""`fedlora deploy run` on a real fleet, in which one process after the other is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks.running_fleet import RunningFleet
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import read_fleet
from fedlora_flwr.server.run_dir import RunDirectory
from tests.deploy import faulty
from tests.deploy.support import own_cache, prepare_faulty, until
from tests.processes.processes import MARK, left_of, marked

pytestmark = pytest.mark.deploy

SEEDED, FRESH = NAMES = ["device-01", "device-02"]
"""One repeats its noise where a round is asked again, since its owner says so; one never does."""
WARM, ROUNDS = {SEEDED: 600, FRESH: 0}, 4
CONTINUES = "The run continues after the last finished round in 0 s"


def prepare(base: Path) -> RunConfig:
    config = prepare_faulty(
        base, NAMES, 80, local_steps=2, min_clients=2, round_timeout=200.0, seed=5,
        reproducible=True,
    )  # fmt: skip
    for name in NAMES:
        file = base / "fleet" / "devices" / name / "device.toml"
        settings = file.read_text().replace("keep-warm = 600", f"keep-warm = {WARM[name]}")
        file.write_text("reproducible = true\n" * (name == SEEDED) + settings)
    return config


@dataclass
class Scene:
    """A fleet on this machine, and what happens to it."""

    base: Path
    config: RunConfig
    fleet: RunningFleet
    serials: list[int] = field(default_factory=list)
    spent: dict[str, list[int]] = field(default_factory=dict)
    refused: str = ""
    interrupted: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> RunDirectory:
        return RunDirectory(self.base / "run")

    @property
    def said(self) -> str:
        return (self.base / "said").read_text()

    def play(self) -> Scene:
        with (self.base / "said").open("w") as said:
            operator = self.operate(said)
        # A device whose key is not registered yet is refused, and its unit tries again.
        self.until(lambda: self.said.count("registered successfully") == len(NAMES))
        self.tell(SEEDED, faulty.HANG)
        for name in NAMES:
            self.start(name)
        self.lose_a_supernode()
        self.lose_the_server_app()
        self.lose_the_superlink()
        operator.wait(600)
        self.spent = {name: self.ledger(name) for name in NAMES}
        self.begin_where_another_run_is()
        self.interrupt()
        return self

    def operate(self, said: Any, *more: str) -> subprocess.Popen[bytes]:
        """Type the operator's one command."""
        recipe = self.base / "recipe.toml"
        recipe.write_text(self.config.to_toml())
        command = [
            "fedlora",
            "deploy",
            "run",
            str(self.fleet.folder),
            str(recipe),
            "--server",
            "--pause",
            "0",
        ]
        return subprocess.Popen(
            [*command, *more],
            stdout=said,
            stderr=said,
            env={**self.fleet.env, MARK: str(self.base)},
        )

    def lose_a_supernode(self) -> None:
        """Kill a SuperNode in the first round, and start it again as its unit does."""
        self.wait_for_hanging(SEEDED)
        self.until(lambda: "Sent successfully" in self.fleet.log(FRESH).read_text())
        os.kill(self.fleet.processes[SEEDED].pid, signal.SIGKILL)
        self.fleet.stop([SEEDED])
        self.untell(SEEDED, faulty.HANG)
        self.tell(FRESH, faulty.HANG)  # From the second round on, as it has answered the first.
        self.until(lambda: self.is_back(SEEDED))

    def lose_the_server_app(self) -> None:
        """Kill the run's own process in the second round."""
        self.after_round(1)
        self.wait_for_hanging(FRESH)
        self.process("flwr-serverapp").kill()
        self.untell(FRESH, faulty.HANG)
        self.until(lambda: self.said.count(CONTINUES) == 1)

    def lose_the_superlink(self) -> None:
        """Renew the certificate, and kill the server in the third round."""
        self.after_round(2)
        self.tell(SEEDED, faulty.HANG)
        self.wait_for_hanging(SEEDED)
        self.serials.append(self.serial())
        renewed = self.fleet.operator("fedlora", "deploy", "renew", self.fleet.folder)
        assert "is valid until" in renewed
        self.process("serve").kill()
        self.untell(SEEDED, faulty.HANG)
        self.until(lambda: self.said.count("The SuperLink is started.") == 2)
        self.serials.append(self.serial())

    def begin_where_another_run_is(self) -> None:
        """Type the same command once more, which would mix the results of two runs."""
        with (self.base / "refused").open("w") as said:
            assert self.operate(said).wait(300) == 1
        self.refused = (self.base / "refused").read_text()

    def interrupt(self) -> None:
        """End the command by Ctrl-C while its run waits for a device."""
        self.config = RunConfig.of(self.config.items(), {"run-dir": str(self.base / "other")})
        self.fleet.stop(NAMES)
        with (self.base / "interrupted").open("w") as said:
            operator = self.operate(said)
        self.until((self.base / "other" / "config.toml").exists)
        operator.send_signal(signal.SIGINT)
        assert operator.wait(60) == 130
        self.interrupted = (self.base / "interrupted").read_text()
        self.left = left_of(str(self.base), patience=10.0)

    def start(self, name: str) -> Any:
        return self.fleet.start(name, **{faulty.FOLDER: str(self.base / name)})

    def is_back(self, name: str) -> bool:
        """Start a SuperNode; tell whether the server admits it, which still knows the old one."""
        before, process = self.admitted(name), self.start(name)
        self.until(lambda: self.admitted(name) > before or process.poll() is not None)
        if process.poll() is not None:
            self.fleet.stop([name])
        return name in self.fleet.processes

    def admitted(self, name: str) -> int:
        return self.fleet.log(name).read_text().count("SuperNode ID")

    def process(self, program: str) -> Any:
        """Return the operator's own process of a program."""
        found = [psutil.Process(pid) for pid in marked(str(self.base))]
        (one,) = [p for p in found if any(Path(word).name == program for word in p.cmdline()[:4])]
        return one

    def tell(self, name: str, fault: str) -> None:
        (self.base / name / faulty.HANGING).unlink(missing_ok=True)
        (self.base / name / fault).touch()

    def untell(self, name: str, fault: str) -> None:
        (self.base / name / fault).unlink()

    def wait_for_hanging(self, name: str) -> None:
        self.until((self.base / name / faulty.HANGING).exists)

    def after_round(self, number: int) -> None:
        self.until(lambda: len(self.run_dir.rows("rounds")) > number)

    def until(self, done: Callable[[], bool]) -> None:
        until(done, lambda: self.said)

    def serial(self) -> int:
        """Return the serial number of the certificate that the server shows."""
        from cryptography import x509

        shown = ssl.get_server_certificate(("127.0.0.1", read_fleet(self.fleet.folder)[0].port))
        return x509.load_pem_x509_certificate(shown.encode()).serial_number

    def ledger(self, name: str) -> list[int]:
        path = self.fleet.folder / "devices" / name / "state" / "ledger.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return [row[0] for row in db.execute("SELECT round FROM releases ORDER BY id")]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    base = tmp_path_factory.mktemp("survives")
    with own_cache(base):
        config = prepare(base)
        (base / "home").mkdir()
        fleet = RunningFleet(base / "fleet", base / "home")
        try:
            yield Scene(base, config, fleet).play()
        finally:
            fleet.stop(list(fleet.processes))
            left_of(str(base), patience=0.0)


def test_the_run_goes_on_to_its_end_with_every_round_once(scene: Scene) -> None:
    summary = scene.run_dir.summary()
    assert summary is not None, scene.said
    assert (summary["status"], summary["rounds_done"]) == ("completed", ROUNDS)
    rows = scene.run_dir.rows("rounds")
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    for row in rows[1:]:
        used = row["clients_used"] + len(row["declined"]) + len(row["failures"])
        assert used == row["clients_asked"]
    told = [(row["round"], row["client"]) for row in scene.run_dir.rows("clients")]
    assert len(told) == len(set(told))


def test_each_death_is_one_sentence(scene: Scene) -> None:
    assert scene.said.count(CONTINUES) == 2
    assert "The run ended without saying why" in scene.said
    assert "The SuperLink has ended." in scene.said
    assert f"in {scene.base / 'run'}" in scene.said.splitlines()[-1]
    # A device that is gone costs its part of a round, and no restart.
    (lost,) = scene.run_dir.rows("rounds")[1]["failures"]
    # The server sees either that the device is gone, or that it is back without its task.
    assert "Node Unavailable" in lost or "was restarted during this round" in lost


def test_ledgers_count_every_release(scene: Scene) -> None:
    # The seeded device's answer to a repeated request is the same, and counts once.
    assert scene.spent[SEEDED] == [1, 2, 3, 4]
    # The fresh one's answers differ: the second round counts twice, and fills its plan early.
    assert scene.spent[FRESH] == [1, 2, 2, 3]
    sent = scene.fleet.log(FRESH).read_text().count("Sent successfully")
    assert sent >= 4


def test_the_server_takes_up_a_renewed_certificate(scene: Scene) -> None:
    before, after = scene.serials
    assert before != after


def test_a_run_that_refuses_is_not_started_again(scene: Scene) -> None:
    assert "not started again" in scene.refused
    assert "a folder that no other run has written to" in scene.refused
    assert CONTINUES not in scene.refused


def test_ctrl_c_leaves_no_process(scene: Scene) -> None:
    assert scene.left == []
    assert f"--resume {scene.base / 'other'} continues it." in scene.interrupted
