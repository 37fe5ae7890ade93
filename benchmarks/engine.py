"""The cost of Flower's messages in this process, and the time until a run's first round."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.figures import Figure
from benchmarks.rounds import time_rounds
from benchmarks.step import Shape
from benchmarks.tasks import ShapeTask, layers
from fedlora_flwr.clients.trainer import LocalTrainer, LocalUpdate
from fedlora_flwr.config import RunConfig
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run

WIDTH, DEPTH = 768, 32
MESSAGE_BAR, START_BAR = 2.0, 1 / 3


class Stack(ShapeTask):
    """A task with a model that has adapters of 1.5 MB and trains very fast."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        return layers("stack", WIDTH, DEPTH)


@dataclass(frozen=True)
class Setting:
    """How many clients a round has, and how many rounds and starts are measured."""

    clients: int = 20
    rounds: int = 40
    starts: int = 3


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Measure the overhead of a client's message, then starts with and without Ray in turns."""
    on_figure(_message(setting))
    on_figure(_start(setting))


def _message(setting: Setting) -> Figure:
    """Measure `overheads` in a new process, which does not depend on what ran in this one."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(setting.clients), str(setting.rounds)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # A second thread that waits counts, too.
        capture_output=True,
        text=True,
        check=True,
    )
    found = [1e3 * float(word) for word in done.stdout.splitlines()[-1].split()]
    low, middle, high = statistics.quantiles(found, n=4)
    return Figure(
        f"CPU time of a client's message, adapters of {4e-6 * 2 * 8 * WIDTH * DEPTH:.1f} MB",
        middle,
        MESSAGE_BAR,
        "ms",
        "what is allowed over the private steps alone",
        1.0,
        f"quartiles of {len(found)} rounds: {low:.2f} and {high:.2f} ms",
    )


def overheads(clients: int, count: int) -> list[float]:
    """Return the CPU seconds per message that each of a number of rounds takes beside training.

    Training is timed within the round, because the difference between a round and a loop of the
    same training is as uncertain as both of them.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch, _training() as trained:
        folder = Path(scratch)
        log_to_file(folder / "flower.log")
        run_dir = RunDirectory(folder / "run")
        config = stack_config(run_dir.path, clients, count + 2, **{"batch-size": 1})
        found: list[float] = []
        mark = 0.0

        def after_round() -> None:
            nonlocal mark
            found.append((time.process_time() - mark - sum(trained)) / clients)
            trained.clear()
            mark = time.process_time()

        time_rounds(prepare_run(config), run_dir, between=after_round)
    # The first builds the clients' model, and what comes after the last is the end of the run.
    return found[1:-1]


@contextmanager
def _training() -> Iterator[list[float]]:
    """Note the CPU seconds of each client's private steps."""
    seconds: list[float] = []
    train = LocalTrainer.train

    def timed(*given: Any, **more: Any) -> LocalUpdate:
        begin = time.process_time()
        try:
            return train(*given, **more)
        finally:
            seconds.append(time.process_time() - begin)

    LocalTrainer.train = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        LocalTrainer.train = train  # type: ignore[method-assign]


def stack_config(folder: Path, clients: int, rounds: int, **changes: Any) -> RunConfig:
    """Return a run of `Stack` whose results go to a folder; every client takes part by default."""
    return RunConfig.of(
        {
            "task": "benchmarks.engine:Stack",
            "strategy": "dp-lora",
            "num-clients": clients,
            "num-rounds": rounds,
            "eval-every": rounds,
            "rank": 8,
            "local-steps": 1,
            "batch-size": 4,
            "device": "cpu",
            "reproducible": True,
            "run-dir": str(folder),
            "state-dir": str(folder),
            "min-clients": clients,
            "share-weights": False,
        },
        changes,
    )


def _start(setting: Setting) -> Figure:
    """Time the digits recipe until its first round is over: `simulate` and `run` in turns."""
    seconds: dict[str, list[float]] = {"simulate": [], "run": []}
    for _ in range(setting.starts):
        for command, found in seconds.items():
            found.append(_until_first_round(command))
    return Figure(
        "from start to the end of the first round, digits",
        statistics.median(seconds["simulate"]),
        statistics.median(seconds["run"]),
        "s",
        "flwr run, on Ray",
        START_BAR,
    )


def _until_first_round(command: str) -> float:
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        arguments = [command, "digits", "-c", "num-rounds=1", "--output", scratch]
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "fedlora_flwr.cli", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = []
            taken = None
            for line in process.stdout or ():
                lines.append(line)
                if line.startswith("round 1/") and taken is None:
                    taken = time.perf_counter() - begin
    if taken is None or process.returncode:
        raise RuntimeError(f"fedlora {command} gave no first round:\n{''.join(lines)}")
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the CPU seconds per message of each round, beside those of its training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=main.__doc__)
    for name in ("clients", "rounds"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(*overheads(given.clients, given.rounds))


if __name__ == "__main__":
    main()
