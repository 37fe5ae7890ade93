"""The part of the soak with devices: a fleet over TLS, whose processes are killed until it is done.

`fedlora deploy run` sees the run through. It is typed again when it is killed itself, and a device
that has ended is started again, as its unit does. The run has to do all its rounds. A device's
ledger has to count all that the device has sent.
"""

from __future__ import annotations

import random
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos import Chaos
from benchmarks.marked import MARK, left_of
from benchmarks.running_fleet import RunningFleet
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import SETTINGS, Fleet, make_fleet
from fedlora_flwr.privacy.ledger import LEDGER
from fedlora_flwr.server.endings import COMPLETED
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import QUIET, free_port

DEVICES = ("device-01", "device-02", "device-03")
FRESH = "device-03"
"""The device whose noise never repeats; the others answer a repeated request with the same bits."""
PATIENCE = 900.0  # seconds in which a round must end
PAUSE = 3.0  # seconds before a device that has ended is started again
SENT = re.compile(r"Sending: train(?:(?!\[RUN).)*?Sent successfully", re.DOTALL)
"""What a SuperNode logs of an answer that its server has taken."""
CONTINUES = "The run continues after the last finished round"
DECLINED = "budget exhausted"
ANSWERS_FOR = ("ClientApp", "warm process")
"""Processes of a device whose death the device answers with an error."""


@dataclass
class FleetChaos(Chaos):
    """A fleet of devices, and the command that sees its run through.

    Parameters
    ----------
    folder, mark, rounds, kills, seed, say
        As for `Chaos`.

    Attributes
    ----------
    typed : int
        How often the operator's command was typed.
    """

    typed: int = field(default=0, init=False)
    _ended: dict[str, float] = field(default_factory=dict, init=False)

    def result(self) -> dict[str, Any]:
        """Let the fleet do its run; return what the soak's file has of it."""
        self._fleet, temporary = self._made(), self.folder / "tmp"
        self._own = {**QUIET, MARK: self.mark, "TMPDIR": str(temporary)}
        self._run = RunDirectory(self.folder / "run")
        self._said = self.folder / "said"
        try:
            self._play(random.Random(self.seed))
        finally:
            self._operator.send_signal(signal.SIGINT)  # Where this part itself has failed.
            self._fleet.stop(list(self._fleet.processes))
            left_of(self.mark)
        ledgers = {name: self._account(name) for name in DEVICES}
        return {
            "rounds": self.rounds,
            "devices": len(DEVICES),
            "kills": self.killed.total(),
            "killed": dict(self.killed),
            "commands typed": self.typed,
            "continued by the command": self._said.read_text().count(CONTINUES),
            "failures in the rounds": sum(len(r["failures"]) for r in self._run.rows("rounds")[1:]),
            "ledgers": ledgers,
            "checks": {name: bool(holds) for name, holds in self._checks(ledgers)},
        }

    def _made(self) -> RunningFleet:
        run = RunConfig.of({
            "task": "digits", "strategy": "la-lora", "num-rounds": self.rounds,
            "num-clients": len(DEVICES), "min-clients": 2, "min-completion": 0.3, "batch-size": 8,
            "local-steps": 2, "round-timeout": 300.0, "delta": 1e-5, "seed": self.seed,
            "eval-every": self.rounds, "reproducible": True, "device": "cpu",
            "run-dir": str(self.folder / "run"),
        })  # fmt: skip
        make_fleet(self.folder / "fleet", Fleet(len(DEVICES), port=free_port()), run)
        for name in DEVICES:
            file = self.folder / "fleet" / "devices" / name / SETTINGS
            text = file.read_text().replace('dataset = "data"\n', "")
            text = text.replace("epsilon = 3.0", "epsilon = 8.0")
            file.write_text("reproducible = true\n" * (name != FRESH) + text)
        for made in ("home", "tmp"):
            (self.folder / made).mkdir()
        (self.folder / "recipe.toml").write_text(run.to_toml())
        return RunningFleet(self.folder / "fleet", self.folder / "home")

    def _play(self, draw: random.Random) -> None:
        operator = self._operator = self._typed()
        for name in DEVICES:
            self._start(name)
        goal, delay = draw.randint(1, 2), 3 * draw.random()
        reached: float | None = None
        last, since = 0, time.monotonic()
        while operator.poll() != 0:
            if operator.poll() is not None:
                if self.typed > self.kills + 3:
                    raise RuntimeError(f"The command ends again and again; see {self._said}.")
                operator = self._operator = self._typed()
            self._start_again()
            if reached is None and self._round() >= goal:
                reached = time.monotonic()
            if reached and time.monotonic() > reached + delay and not self.over:
                if kind := self.kill_one(draw):
                    total = self.killed.total()
                    self.say(f"round {self._round()}, {total} kills so far, now: {kind}")
                goal, delay = self._round() + draw.randint(0, self.stride), 8 * draw.random()
                reached = None
            if self._round() > last:
                last, since = self._round(), time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise RuntimeError(f"No round has ended in {PATIENCE:g} s; see {self._said}.")
            time.sleep(0.1)

    def _typed(self) -> subprocess.Popen[bytes]:
        """Type the operator's one command."""
        self.typed += 1
        again = ("--resume", str(self._run.path)) if self.typed > 1 else ()
        command = ("fedlora", "deploy", "run", str(self._fleet.folder))
        with self._said.open("ab") as log:
            return subprocess.Popen(
                (*command, str(self.folder / "recipe.toml"), "--server", "--pause", "0",
                 "--restarts", "1000", *again),
                stdout=log, stderr=log, env={**self._fleet.env, **self._own},
            )  # fmt: skip

    def _start(self, name: str) -> None:
        self._fleet.start(name, **self._own)

    def _start_again(self) -> None:
        """Start devices that have ended, after a pause, as their units do."""
        for name, process in list(self._fleet.processes.items()):
            if process.poll() is not None:
                self._fleet.stop([name])  # A unit ends what its service has left behind.
                self._ended[name] = time.monotonic()
        for name, ended in list(self._ended.items()):
            if time.monotonic() > ended + PAUSE:
                del self._ended[name]
                self._start(name)

    def _round(self) -> int:
        return max((row["round"] for row in self._run.rows("rounds")), default=0)

    def _account(self, name: str) -> dict[str, Any]:
        """Return what a device has sent by its log, and what its ledger has of it."""
        state = self._fleet.folder / "devices" / name / "state"
        with closing(sqlite3.connect(f"file:{state / LEDGER}?mode=ro", uri=True)) as db:
            rows = [row[0] for row in db.execute("SELECT round FROM releases ORDER BY id")]
        log = self._fleet.log(name).read_text()
        used = {row["round"] for row in self._run.rows("clients") if row["client"] == name}
        return {
            "rows": len(rows),
            "repeated": len(rows) - len(set(rows)),
            "answers": len(SENT.findall(log)),
            "declined": log.count(DECLINED),
            "used": len(used),
            "not counted": sorted(used - set(rows)),
            "without a row": sorted(set(range(1, self.rounds + 1)) - set(rows)),
        }

    def _checks(self, ledgers: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bool]]:
        status = (self._run.summary() or {}).get("status")
        numbers = [row["round"] for row in self._run.rows("rounds")]
        yield "the run is completed", status == COMPLETED
        yield "each round is there once", numbers == list(range(self.rounds + 1))
        yield (
            "each release that was used is counted",
            not any(account["not counted"] for account in ledgers.values()),
        )
        fresh = ledgers[FRESH]
        # An answer is a release, or it is the error of a client that was killed or had no budget.
        errors = fresh["declined"] + sum(self.killed[kind] for kind in ANSWERS_FOR)
        yield "each answer is a row or an error", fresh["answers"] <= fresh["rows"] + errors
        yield "at most one repeated row per kill", fresh["repeated"] <= self.killed.total()
        yield (
            "the same bits are counted once",
            not any(account["repeated"] for name, account in ledgers.items() if name != FRESH),
        )
        yield (
            "each round without a row is one that the server did not use",
            all(
                len(account["without a row"]) + account["used"] <= self.rounds
                for account in ledgers.values()
            ),
        )
