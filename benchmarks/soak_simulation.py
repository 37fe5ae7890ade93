"""The part of the soak on one machine: a run whose processes are killed, beside one left alone.

In the one run, a process that is drawn from all processes of the run gets SIGKILL after a drawn
time. The run is then continued with ``--resume``, until it is complete. Both runs must end with the
same arrays, rows, ε and ledger.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import Chaos
from benchmarks.marked import MARK, handles, left_of
from fedlora_flwr.privacy.ledger import LEDGER
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.endings import COMPLETED
from fedlora_flwr.server.run_dir import ROWS, RunDirectory
from fedlora_flwr.simulations.superlink import QUIET

COMMAND = (sys.executable, "-m", "fedlora_flwr.cli")
PATIENCE = 600.0  # seconds in which a run must do something
STARTS = {"simulate": 0.65, "simulate --workers 2": 0.25, "run": 0.1}
"""How a run is continued, and how often: in the command's process, in workers, on Ray."""


@dataclass
class SimulationChaos(Chaos):
    """A run on this machine.

    Parameters
    ----------
    folder, mark, rounds, kills, seed, say
        As for `Chaos`.
    clients : int
        Clients of each round.

    Attributes
    ----------
    starts : Counter
        Starts by command.
    open : dict
        Most handles that the undisturbed run had open at one time, by tenth of its rounds.
    """

    spared = ("Ray",)  # If it dies, the run continues without some clients, and differs rightly.
    clients: int
    starts: Counter[str] = field(default_factory=Counter, init=False)
    open: dict[int, int] = field(default_factory=dict, init=False)

    def result(self) -> dict[str, Any]:
        """Do both runs; return what the soak's file has of them."""
        first, second = outcome(self.undisturbed()), outcome(self.disturbed())
        handles = [self.open[tenth] for tenth in sorted(self.open)]
        same = {f"the same {part}": first[part] == second[part] for part in first}
        return {
            "rounds": self.rounds,
            "clients": self.clients,
            "kills": self.killed.total(),
            "killed": dict(self.killed),
            "starts": dict(self.starts),
            "checks": {**same, "late rounds hold no more open": handles[-1] <= max(handles[:-1])},
            "epsilon": [run["summary"].get("epsilon_max") for run in (first, second)],
            "ledger rows": len(second["ledger"]),
            "most open handles by tenth of the rounds": handles,
        }

    def undisturbed(self) -> Path:
        """Run once without a kill; return the run's folder."""
        run = self.folder / "undisturbed"
        with self._started("simulate", *self._first(run)) as process:
            try:
                while process.poll() is None:
                    tenth, count = 10 * (_round(run) or 0) // self.rounds, len(handles(process.pid))
                    self.open[tenth] = max(self.open.get(tenth, 0), count)
                    time.sleep(0.05)
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"The undisturbed run failed; see {run / 'run.log'}.")
        return run

    def disturbed(self) -> Path:
        """Run with kills until the run is complete; return the run's folder."""
        run, draw = self.folder / "disturbed", random.Random(self.seed)
        while not _complete(run):
            begun = _round(run) is not None
            way = draw.choices(list(STARTS), list(STARTS.values()))[0] if begun else "simulate"
            arguments = ("--resume", str(run)) if begun else self._first(run)
            kills = self.killed.total()
            with self._started(way, *arguments) as process:
                try:
                    self._disturb(process, run, draw)
                finally:
                    process.kill()
            if process.returncode and self.killed.total() == kills:
                raise RuntimeError(f"The run failed by itself; see {run / 'run.log'}.")
            self.say(f"round {_round(run)}, {self.killed.total()} kills so far")
        return run

    def _first(self, run: Path) -> tuple[str, ...]:
        pairs = (
            f"num-rounds={self.rounds}", f"num-clients={self.clients}", f"eval-every={self.rounds}",
            "strategy=la-lora", "partitioner=iid", "batch-size=8", "local-steps=2",
            "reproducible=true", "delta=1e-3", f"run-dir={run}",
        )  # fmt: skip
        return ("digits", *(word for pair in pairs for word in ("-c", pair)))

    def _started(self, way: str, *arguments: str) -> subprocess.Popen[bytes]:
        self.starts[way] += 1
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        own = {**QUIET, MARK: self.mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                (*COMMAND, *way.split(), *arguments),
                stdout=log,
                stderr=log,
                env={**os.environ, **own},
            )

    def _disturb(self, process: subprocess.Popen[bytes], run: Path, draw: random.Random) -> None:
        """Kill processes at drawn times, until the command ends."""
        while not self.over and process.poll() is None:
            if draw.random() < 0.8:  # At work; otherwise, perhaps before its first round.
                _wait_for_rounds(process, run, draw.randint(1, self.stride))
            _wait(process, draw.random())
            if process.poll() is None and (kind := self.kill_one(draw)):
                _wait(process, PATIENCE if kind in ("command", "worker") else 1.0)
        process.wait(PATIENCE * 10)
        left_of(self.mark)  # Keepers clear up.


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _wait_for_rounds(process: subprocess.Popen[bytes], run: Path, rounds: int) -> None:
    goal, deadline = (_round(run) or 0) + rounds, time.monotonic() + PATIENCE
    while process.poll() is None and (_round(run) or 0) < goal:
        if time.monotonic() > deadline:
            raise RuntimeError(f"No round has ended in {PATIENCE:g} s; see {run / 'run.log'}.")
        time.sleep(0.02)


def _round(run: Path) -> int | None:
    """Return the round of the newest checkpoint; None if there is none."""
    return max(Checkpoints(run).rounds(), default=None)


def _complete(run: Path) -> bool:
    summary = RunDirectory(run).summary() if run.exists() else None
    return (summary or {}).get("status") == COMPLETED


def outcome(run: Path) -> dict[str, Any]:
    """Return what two equal runs have in common: all results but for times and memory."""
    summary = {k: v for k, v in (RunDirectory(run).summary() or {}).items() if k != "seconds"}
    last, damaged = Checkpoints(run).last()
    arrays = {name: _digest(array.tobytes()) for name, array in sorted(last.arrays.items())}
    return {
        "summary": summary,
        **{name: timeless_rows(run, name) for name in ROWS},
        "ledger": releases(run),
        "arrays": arrays,
        "damaged checkpoints": damaged,
        "adapter": _digest((run / "adapter" / "adapter_model.safetensors").read_bytes()),
    }


def timeless_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Return a run's rows without what a clock or the machine says."""
    clocks = ("seconds", "peak-memory-mb")
    return [
        {key: value for key, value in row.items() if key not in clocks}
        for row in RunDirectory(run).rows(name)
    ]


def releases(run: Path) -> list[tuple[Any, ...]]:
    """Return the rows of a run's ledger, apart from names of runs and times."""
    with closing(sqlite3.connect(run / LEDGER)) as db:
        columns = "client, round, noise_multiplier, sample_rate, steps"
        return sorted(db.execute(f"SELECT {columns} FROM releases"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
