"""``python -m benchmarks.soak``: kill a run's processes again and again, and compare what is left.

The same command runs twice. One run is left alone. In the other, a process that is drawn from all
processes of the run gets SIGKILL after a drawn time. The run is then continued with ``--resume``,
until it is complete. Both runs must end with the same arrays, rows, ε and ledger. Nothing may be
left on the machine: no process, temporary file, or shared memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.marked import MARK, command_of, marked
from fedlora_flwr.environment import machine, versions
from fedlora_flwr.files import replace_file, to_json
from fedlora_flwr.privacy.ledger import LEDGER
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.server.endings import COMPLETED
from fedlora_flwr.server.run_dir import ROWS, RunDirectory
from fedlora_flwr.simulations.superlink import QUIET
from fedlora_flwr.terminal import guard, show_lines

RESULT = Path(__file__).parent / "results" / "soak.json"
COMMAND = (sys.executable, "-m", "fedlora_flwr.cli")
SHARED_MEMORY = Path("/dev/shm")
CACHE = "torchinductor_"
"""Start of the name of torch's own cache, which it keeps for all processes of a user."""
PATIENCE = 600.0  # seconds in which a run must do something
KINDS = {
    "keeper.py": "keeper",
    "spawn_main": "worker",
    "resource_tracker": "resource tracker",
    "flwr-serverapp": "ServerApp",
    "flower-superlink": "SuperLink",
    "flwr-simulation": "simulation",
    "gcs_server": "Ray",
    "raylet": "Ray",
    "ray::": "Ray",
    "fedlora_flwr.cli": "command",
}
"""What a process is, by a word of its command line."""
SPARED = ("Ray",)
"""If one of these dies, the run continues without some clients, and its results differ rightly."""


@dataclass
class Soak:
    """A run that is killed and continued.

    Parameters
    ----------
    folder : Path
        An empty folder.
    settings : tuple[str, ...]
        Keys of the run over those of the digits recipe, as ``key=value``.
    seed : int
        Decides who is killed, and when.
    kills : int
        The most kills. After them the run is left alone.
    ray_share : float
        Share of the attempts that use Ray.

    Attributes
    ----------
    killed : Counter
        Kills by kind of process.
    attempts : Counter
        Starts by command.
    """

    folder: Path
    settings: tuple[str, ...]
    seed: int
    kills: int
    ray_share: float
    killed: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    _mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def undisturbed(self) -> Path:
        """Run once without a kill; return the run's folder."""
        run = self.folder / "undisturbed"
        with self._started("simulate", *self._first(run)) as process:
            try:
                code = process.wait()
            finally:
                process.kill()
        if code:
            raise RuntimeError(f"The undisturbed run failed; see {run / 'run.log'}.")
        return run

    def disturbed(self, console: Console) -> Path:
        """Run with kills until the run is complete; return the run's folder."""
        run, draw = self.folder / "disturbed", random.Random(self.seed)
        while not _complete(run):
            begun = _round(run) is not None
            command = "run" if begun and draw.random() < self.ray_share else "simulate"
            arguments = ("--resume", str(run)) if begun else self._first(run)
            with self._started(command, *arguments, *self._workers(command)) as process:
                try:
                    self._disturb(process, run, draw)
                finally:
                    process.kill()
            total = self.killed.total()
            show_lines(console, [("Soak", f"round {_round(run)}, {total} kills so far")])
        return run

    def left_over(self) -> list[str]:
        """Name processes and temporary files that are still there."""
        processes = [command_of(process)[:200] for process in marked(self._mark)]
        files = [path for path in (self.folder / "tmp").glob("*") if CACHE not in path.name]
        return [*processes, *(str(path) for path in files)]

    def _first(self, run: Path) -> tuple[str, ...]:
        pairs = (*self.settings, f"run-dir={run}")
        return ("digits", *(word for pair in pairs for word in ("-c", pair)))

    def _workers(self, command: str) -> tuple[str, ...]:
        return ("--workers", "2") if command == "simulate" else ()

    def _started(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        self.attempts[command] += 1
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        own = {**QUIET, MARK: self._mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                (*COMMAND, command, *arguments), stdout=log, stderr=log, env={**os.environ, **own}
            )

    def _disturb(self, process: subprocess.Popen[bytes], run: Path, draw: random.Random) -> None:
        """Kill processes at drawn times, until the command ends."""
        while self.killed.total() < self.kills and process.poll() is None:
            if draw.random() < 0.8:  # At work; otherwise, perhaps before its first round.
                _wait_for_rounds(process, run, draw.randint(1, 4))
            _wait(process, draw.random() * 2)
            found = [(kind, p) for p in marked(self._mark) if (kind := _kind(p)) not in SPARED]
            if not found:
                return
            kind, victim = draw.choice(sorted(found))
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed[kind] += 1
            _wait(process, PATIENCE if kind in ("command", "worker") else 1.0)
        process.wait(PATIENCE * 10)
        deadline = time.monotonic() + 60.0
        while marked(self._mark) and time.monotonic() < deadline:  # Keepers clear up.
            time.sleep(0.1)


def _kind(process: int) -> str:
    words = command_of(process)
    return next((kind for word, kind in KINDS.items() if word in words), "other")


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


def soak(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Do both runs; return the result as the JSON file has it."""
    settings = (
        f"num-rounds={options.rounds}", f"num-clients={options.clients}", "strategy=la-lora",
        "partitioner=iid", "batch-size=8", "local-steps=2", f"eval-every={options.rounds}",
        "reproducible=true", "delta=1e-3",
    )  # fmt: skip
    before = {path.name for path in SHARED_MEMORY.glob("*")}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedlora-soak-") as scratch:
        chaos = Soak(Path(scratch), settings, options.seed, options.kills, options.ray_share)
        first, second = outcome(chaos.undisturbed()), outcome(chaos.disturbed(console))
        left = chaos.left_over()
        after = {path.name for path in SHARED_MEMORY.glob("*")}
    return {
        "rounds": options.rounds,
        "clients": options.clients,
        "seed": options.seed,
        "kills": chaos.killed.total(),
        "killed": dict(chaos.killed),
        "starts": dict(chaos.attempts),
        "equal": {part: first[part] == second[part] for part in first},
        "epsilon": second["summary"].get("epsilon_max"),
        "ledger rows": len(second["ledger"]),
        "left over": left,
        "shared memory left over": sorted(after - before),
        "seconds": round(time.monotonic() - started),
        "machine": machine(),
        "versions": versions(),
    }


def verdict(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines that sum up a result."""
    killed = ", ".join(f"{kind} {count}" for kind, count in sorted(result["killed"].items()))
    yield "Kills", f"{result['kills']} ({killed}) in {result['seconds']} s"
    unequal = [part for part, same in result["equal"].items() if not same]
    yield "Equal", f"no: {', '.join(unequal)}" if unequal else "all results, bit for bit"
    left = [*result["left over"], *result["shared memory left over"]]
    yield "Left over", "; ".join(left) or "nothing"


def main(argv: Sequence[str] | None = None) -> None:
    """Kill a run's processes again and again, and compare it with a run that is left alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the run")
    parser.add_argument("--clients", type=int, default=20, help="clients of each round")
    parser.add_argument("--kills", type=int, default=60, help="the most kills")
    parser.add_argument("--ray-share", type=float, default=0.1, help="share of starts on Ray")
    parser.add_argument("--seed", type=int, default=21, help="decides who is killed, and when")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file of the result")
    options = parser.parse_args(argv)
    console = Console()
    result = guard(lambda: soak(options, console))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.output, (to_json(result, indent=2) + "\n").encode())
    show_lines(console, list(verdict(result)))
    unequal = not all(result["equal"].values())
    sys.exit(unequal or bool(result["left over"]))


if __name__ == "__main__":
    main()
