"""What a round costs when many clients are registered and few take part."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora_flwr.bench.engine import stack_config
from fedlora_flwr.bench.figures import Figure
from fedlora_flwr.bench.rounds import time_rounds
from fedlora_flwr.simulations.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import make_plan
from fedlora_flwr.simulations.workers import log_to_file

TIME_BAR, MEMORY_BAR = 1.2, 1.1


@dataclass(frozen=True)
class Setting:
    """Numbers of registered clients, how many of them a round samples, and how many rounds."""

    registered: tuple[int, ...] = (10, 100, 1_000, 10_000)
    sampled: int = 10
    rounds: int = 9


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Run each number of clients in a process of its own, and compare with the smallest."""
    least, *others = setting.registered
    reference = _in_process_of_its_own(least, setting)
    for registered in others:
        found = _in_process_of_its_own(registered, setting)
        what, against = f"{registered:,} clients, {setting.sampled} a round", f"{least} clients"
        for name, unit, bar in (("seconds", "s", TIME_BAR), ("megabytes", "MB", MEMORY_BAR)):
            title = {"seconds": "a round", "megabytes": "peak memory"}[name]
            figure = Figure(f"{what}: {title}", found[name], reference[name], unit, against, bar)
            on_figure(figure)


def rounds_of(registered: int, sampled: int, rounds: int) -> dict[str, float]:
    """Run here; return the median seconds of a round, and the process' peak memory.

    The first round, which builds the model and asks every client who it is, does not count.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        log_to_file(folder / "flower.log")
        run_dir = RunDirectory(folder / "run")
        plan = make_plan(
            stack_config(
                run_dir.path, registered, rounds + 1, **{"fraction-train": sampled / registered}
            )
        )
        seconds = time_rounds(plan, run_dir)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": statistics.median(seconds), "megabytes": megabytes}


def _in_process_of_its_own(registered: int, setting: Setting) -> dict[str, float]:
    arguments = [str(n) for n in (registered, setting.sampled, setting.rounds)]
    run = subprocess.run(
        [sys.executable, "-m", __name__, *arguments], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"{registered} clients: {run.stderr[-2000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(rounds_of(*map(int, sys.argv[1:]))))
