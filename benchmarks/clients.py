"""The cost of a round if many clients are registered and few take part."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks import ROOT
from benchmarks.engine import stack_config
from benchmarks.figures import Figure
from benchmarks.rounds import time_rounds
from fedlora_flwr.environment import peak_memory
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run

TIME_BAR, MEMORY_BAR = 1.2, 1.1
START = 10.0  # seconds


@dataclass(frozen=True)
class Setting:
    """Numbers of registered clients, the number that a round samples, and the number of rounds."""

    registered: tuple[int, ...] = (10, 100, 1_000, 10_000)
    sampled: int = 10
    rounds: int = 9


MILLION = Setting((100, 10_000, 1_000_000), sampled=100, rounds=7)
"""Hundred clients of up to a million."""


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Run each number of clients in a process of its own, round by round in turns."""
    reference, *others = _in_turns(setting)
    against = f"{setting.registered[0]} clients"
    for registered, found in zip(setting.registered[1:], others, strict=True):
        what = f"{registered:,} clients, {setting.sampled} a round"
        for name, unit, bar in (("seconds", "s", TIME_BAR), ("megabytes", "MB", MEMORY_BAR)):
            title = {"seconds": "a round", "megabytes": "peak memory"}[name]
            figure = Figure(f"{what}: {title}", found[name], reference[name], unit, against, bar)
            on_figure(figure)
        note = f"{reference['start']:.1f} s with {against}"
        title = f"{what}: from the checks to the first round"
        on_figure(Figure(title, found["start"], START, "s", "what is allowed", 1.0, note))


def rounds_of(
    registered: int, sampled: int, rounds: int, between: Callable[[], object]
) -> dict[str, float]:
    """Run here; return the median seconds of a round, those of the start, and the peak memory.

    The first round, which builds the clients' model, does not count. The start is all before it:
    the checks, the noise of each client, the server's model, and the evaluation of round 0.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        log_to_file(folder / "flower.log")
        run_dir = RunDirectory(folder / "run")
        prepared = prepare_run(
            stack_config(
                run_dir.path, registered, rounds + 1, **{"fraction-train": sampled / registered}
            )
        )
        ready: list[float] = []
        seconds = time_rounds(
            prepared, run_dir, between, started=lambda: ready.append(time.perf_counter())
        )
    return {
        "seconds": statistics.median(seconds),
        "start": ready[0] - begun,
        "megabytes": peak_memory() / 1e6,
    }


def _in_turns(setting: Setting) -> list[dict[str, float]]:
    with ExitStack() as stack:
        runs = []
        for registered in setting.registered:
            # Processes start one after the other, and each waits after its first round.
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            runs.append(stack.enter_context(_Run(registered, setting, log)))
            runs[-1].answer()
        for _ in range(setting.rounds):
            for run in runs:
                run.go_on()
                run.answer()
        for run in runs:
            run.go_on()
        found: list[dict[str, float]] = [json.loads(run.answer()) for run in runs]
        return found


class _Run:
    """A process that runs rounds, and waits after each for its turn."""

    def __init__(self, registered: int, setting: Setting, log: IO[str]) -> None:
        arguments = [str(n) for n in (registered, setting.sampled, setting.rounds)]
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def answer(self) -> str:
        """Wait for a line of the process."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"A process of the benchmark failed: {self._log.read()[-2000:]}")
        return line

    def go_on(self) -> None:
        """Let the process run until the end of the next round."""
        if self._process.stdin:
            self._process.stdin.write("\n")
            self._process.stdin.flush()


def _wait_for_turn() -> None:
    print("round", flush=True)
    sys.stdin.readline()


def main(arguments: Sequence[str] | None = None) -> None:
    """Time rounds for the parent process, one for each line that it sends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=main.__doc__)
    for name in ("registered", "sampled", "rounds"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    print(json.dumps(rounds_of(given.registered, given.sampled, given.rounds, _wait_for_turn)))


if __name__ == "__main__":
    main()
