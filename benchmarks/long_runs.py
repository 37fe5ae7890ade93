"""Whether late rounds of a long run cost as much CPU time as early ones, and how its files grow."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.engine import stack_config
from benchmarks.figures import Figure
from benchmarks.step import Shape
from benchmarks.tasks import ShapeTask, layers
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.rounds import RoundRow
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process

WIDTH, DEPTH, FIRST = 16, 2, 20
BAR = 1.05


class Small(ShapeTask):
    """A task whose model has two layers and trains in no time, so that all else is measured."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        return layers("small", WIDTH, DEPTH)


@dataclass(frozen=True)
class Setting:
    """How long the run is, how many clients it has, and how many rounds are compared."""

    rounds: int = 1000
    clients: int = 3
    window: int = 100


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Run in a process of its own; compare its last rounds with early ones, and size its files."""
    numbers = [str(n) for n in (setting.rounds, setting.clients)]
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as cache:
        # What an earlier run has kept of its accounts would make this one's rounds too quick.
        done = subprocess.run(
            [sys.executable, "-m", __name__, *numbers],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["seconds"]
    early = seconds[FIRST : FIRST + setting.window]
    what = f"CPU time of a round, the last {setting.window} of {setting.rounds:,}"
    against = f"rounds {FIRST} to {FIRST + setting.window}"
    late = statistics.mean(seconds[-setting.window :])
    on_figure(Figure(what, late, statistics.mean(early), "s", against, BAR))
    for name, size in found["sizes"].items():
        on_figure(Figure(f"{name} after {setting.rounds:,} rounds", size / 1e3, None, "kB", ""))


def long_run(rounds: int, clients: int) -> dict[str, Any]:
    """Return the CPU seconds of each round, and the bytes of each file that the run leaves."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        run_dir = RunDirectory(Path(scratch) / "run")
        run_dir.take()
        log_to_file(run_dir.log)
        changes = {"task": "benchmarks.long_runs:Small", "eval-every": 1}
        prepared = prepare_run(stack_config(run_dir.path, clients, rounds, **changes))
        mark = time.process_time()

        def after(_: RoundRow) -> None:
            nonlocal mark
            now = time.process_time()
            seconds.append(now - mark)
            mark = now

        run_in_process(prepared, run_dir, after)
        return {"seconds": seconds, "sizes": _sizes(run_dir.path)}


def _sizes(folder: Path) -> dict[str, int]:
    """Return bytes by name; what is in a folder counts as that folder's."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes: dict[str, int] = {}
    for path in files:
        inner = path.relative_to(folder).parts
        name = inner[0] + ("/" if len(inner) > 1 else "")
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the CPU seconds of each round and the sizes of the run's files, as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_runs", description=main.__doc__
    )
    for name in ("rounds", "clients"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(json.dumps(long_run(given.rounds, given.clients)))


if __name__ == "__main__":
    main()
