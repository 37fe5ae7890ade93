"""``python -m benchmarks.load``: how many SuperNodes one SuperLink of this package holds.

The server is the one that `fedlora deploy run --server` starts, with TLS and a database on disk,
and the run is this package's. The nodes are light: each speaks Flower's own protocol over a
connection of its own, and answers at once (`benchmarks.light_nodes`). They register themselves,
since the operator's command takes seconds for each key. All is on one machine, and the nodes share
its cores with the server, so CPU seconds tell more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import ROOT
from benchmarks.light_nodes import ASKED, CONNECTED, PAUSE
from benchmarks.marked import MARK, by_kind, left_of
from benchmarks.running_fleet import RunningFleet
from fedlora_flwr.config import RunConfig
from fedlora_flwr.deploy.fleet import Fleet, make_fleet, read_fleet
from fedlora_flwr.environment import machine, versions
from fedlora_flwr.files import write_json
from fedlora_flwr.server.endings import COMPLETED
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.superlink import QUIET, free_port
from fedlora_flwr.terminal import show_lines

RESULT = Path(__file__).parent / "results" / "load.json"
NODES = (10, 30, 100, 300, 1000)
RANK = 64
"""An adapter of 98,000 parameters, as many as rank 5 has in the 12 layers of a MiniLM."""
PER_PROCESS = 100
ASKING = 20.0  # seconds in which the nodes only ask for messages
WATCHED = ("SuperLink", "ServerApp")
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """A server with so many nodes.

    Parameters
    ----------
    folder : Path
        An empty folder.
    nodes : int
        Number of nodes.
    rounds : int
        Rounds of the run, each with all nodes.
    patience : float
        Seconds in which a round must end.
    """

    folder: Path
    nodes: int
    rounds: int
    patience: float
    _mark: str = field(default_factory=lambda: secrets.token_hex(8))
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Do the run; return what was measured."""
        fleet = self._made()
        run = RunDirectory(self.folder / "run")
        try:
            self._start(fleet, "fedlora", "deploy", "run", fleet.folder,
                        self.folder / "recipe.toml", "--server", "--restarts", "0")  # fmt: skip
            self._wait_for("SuperLink", 120.0)
            # The run waits for the last node, while the others only ask for messages.
            connecting = self._start_nodes(fleet, 0, self.nodes - 1)
            asked = {
                "nodes": self.nodes,
                "rounds": self.rounds,
                "seconds until connected": connecting,
                "while nodes ask": self._asking(),
                "connected again": self._connected() - (self.nodes - 1),
            }
            if not self.rounds:
                return asked
            self._start_nodes(fleet, self.nodes - 1, 1)
            return {**asked, **self._watched(run)}
        except RuntimeError as error:  # This is where it fails.
            return {"nodes": self.nodes, "rounds": self.rounds, "error": str(error)[:300]}
        finally:
            for process in self._processes:
                process.send_signal(signal.SIGINT)
            for one in left_of(self._mark):
                os.kill(one, signal.SIGKILL)

    def _made(self) -> RunningFleet:
        run = RunConfig.of({
            "task": "digits", "strategy": "dp-lora", "rank": RANK,
            "num-rounds": max(self.rounds, 1), "num-clients": self.nodes, "min-clients": self.nodes,
            "min-completion": 0.0, "round-timeout": self.patience, "local-steps": 1,
            "eval-every": max(self.rounds, 1), "device": "cpu", "robust": "none",
            "run-dir": str(self.folder / "run"),
        })  # fmt: skip
        make_fleet(self.folder / "fleet", Fleet(1, port=free_port()), run)
        script = self.folder / "fleet" / "server" / "start.sh"
        script.write_text(script.read_text().replace("--enable-supernode-auth ", ""))
        (self.folder / "home").mkdir()
        (self.folder / "recipe.toml").write_text(run.to_toml())
        return RunningFleet(self.folder / "fleet", self.folder / "home")

    def _start(self, fleet: RunningFleet, *command: str | Path) -> None:
        env = {**fleet.env, **QUIET, MARK: self._mark, "PYTHONPATH": str(ROOT)}
        with (self.folder / "said").open("ab") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))

    def _start_nodes(self, fleet: RunningFleet, first: int, count: int) -> float:
        """Start nodes, and wait until they are connected; return the seconds that this took."""
        made, started = read_fleet(fleet.folder)[0], time.monotonic()
        authority = fleet.folder / "operator" / "ca.pem"
        for number in range(first, first + count, PER_PROCESS):
            these = min(PER_PROCESS, first + count - number)
            numbers = (f"{made.host}:{made.port}", authority, str(number), str(these))
            self._start(fleet, sys.executable, "-m", "benchmarks.light_nodes", *numbers)
        while self._connected() < first + count:
            if time.monotonic() > started + self.patience:
                raise RuntimeError(f"{self._connected()} nodes connected in {self.patience:g} s.")
            time.sleep(0.2)
        return round(time.monotonic() - started, 1)

    def _connected(self) -> int:
        return (self.folder / "said").read_text().count(CONNECTED)

    def _asking(self) -> dict[str, float]:
        """Watch the SuperLink while nodes only ask for messages."""
        process = self._wait_for("SuperLink", 1.0)
        time.sleep(PAUSE)
        before, asked, started = _cpu_seconds(process), self._asked(), time.monotonic()
        time.sleep(ASKING)
        spent, questions = _cpu_seconds(process) - before, self._asked() - asked
        seconds = time.monotonic() - started
        return {
            "questions per second": round(questions / seconds, 1),
            "CPU ms per question": round(1e3 * spent / max(questions, 1), 1),
            "share of a core": round(spent / seconds, 3),
        }

    def _asked(self) -> int:
        lines = re.findall(rf"(\d+) {ASKED} (\d+)", (self.folder / "said").read_text())
        return sum({first: int(count) for count, first in lines}.values())

    def _wait_for(self, kind: str, patience: float) -> int:
        deadline = time.monotonic() + patience
        while not (found := by_kind(self._mark).get(kind)):
            if time.monotonic() > deadline or self._processes[0].poll() is not None:
                said = (self.folder / "said").read_text()
                raise RuntimeError(f"There is no {kind}: {said[-2000:]}")
            time.sleep(0.2)
        return found[0]

    def _watched(self, run: RunDirectory) -> dict[str, Any]:
        """Watch the server's two processes, round by round."""
        processes = {kind: self._wait_for(kind, 120.0) for kind in WATCHED}
        seen: list[dict[str, float]] = []
        memory = dict.fromkeys(WATCHED, 0.0)
        started = last = time.monotonic()
        while self._processes[0].poll() is None and time.monotonic() - last < self.patience + 700:
            if len(run.rows("rounds")) > len(seen):
                seen.append({kind: _cpu_seconds(process) for kind, process in processes.items()})
                last = time.monotonic()
            for kind, process in processes.items():
                memory[kind] = max(memory[kind], _peak_megabytes(process))
            time.sleep(0.1)
        rows, summary = run.rows("rounds")[1:], run.summary() or {}
        completed = summary.get("status") == COMPLETED
        last_lines = (self.folder / "said").read_text().splitlines()[-5:]
        spent = {kind: [b[kind] - a[kind] for a, b in pairwise(seen[1:])] for kind in WATCHED}
        return {
            "completed": completed,
            "error": "" if completed else summary.get("error", "") or "\n".join(last_lines),
            "seconds": round(last - started, 1),
            "seconds per round": [round(row["seconds"], 2) for row in rows],
            "clients used": [row["clients_used"] for row in rows],
            "failures": [len(row["failures"]) for row in rows],
            "first failures": sorted({f.partition(": ")[2] for r in rows for f in r["failures"]})[
                :3
            ],
            "MB down and up per round": [
                round((row["bytes_down"] + row["bytes_up"]) / 1e6, 1) for row in rows
            ],
            "CPU seconds per later round": {
                kind: round(statistics.median(each), 2) if each else None
                for kind, each in spent.items()
            },
            "peak MB": {kind: round(peak) for kind, peak in memory.items()},
        }


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def _peak_megabytes(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a round with more and more nodes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=main.__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES, help="numbers of nodes")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="rounds of each run; with 0 nodes only ask for messages",
    )
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for a round")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file of the result")
    options = parser.parse_args(argv)
    for nodes in options.nodes:
        with tempfile.TemporaryDirectory(prefix="fedlora-load-") as scratch:
            result = Load(Path(scratch), nodes, options.rounds, options.patience).result()
        output = options.output
        earlier = json.loads(output.read_text())["runs"] if output.exists() else []
        same = (nodes, options.rounds)
        kept = [run for run in earlier if (run["nodes"], run["rounds"]) != same]
        runs = sorted([*kept, result], key=lambda run: (run["rounds"], run["nodes"]))
        found = {"runs": runs, "machine": machine(), "versions": versions()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, found)
        show_lines(Console(), [(f"{nodes} nodes", str(result))])


if __name__ == "__main__":
    main()
