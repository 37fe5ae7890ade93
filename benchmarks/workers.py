"""Measures the memory of one more worker process beyond its imports."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.figures import Figure
from benchmarks.step import Shape, roberta
from benchmarks.tasks import ShapeTask

MEMORY_BAR = 100.0


@dataclass(frozen=True)
class Setting:
    """The task with the workers' model, a task with a tiny model, and the number of workers."""

    task: str = "benchmarks.workers:Texts"
    tiny: str = "benchmarks.workers:TinyTexts"
    workers: int = 2


class Texts(ShapeTask):
    """Random texts for RoBERTa-base."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        return roberta()


class TinyTexts(ShapeTask):
    """The same for a RoBERTa of one layer and four features, to measure only the imports."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        return roberta(
            hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Start workers that share the model, one with its own, and one of a tiny model, together.

    All are copies of one process that has imported what they need.
    """
    kinds = [("apart", setting.tiny), ("apart", setting.task)]
    kinds += [("shared", setting.task)] * setting.workers
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        imports, apart, *sharing = _megabytes(kinds, Path(scratch))
    shared = max(sharing)
    on_figure(
        Figure(
            "one more worker beyond imports, RoBERTa-base",
            shared - imports,
            MEMORY_BAR,
            "MB",
            f"what is allowed; {apart - imports:.0f} MB where nothing is shared",
            1.0,
        )
    )


def _megabytes(kinds: list[tuple[str, str]], scratch: Path) -> list[float]:
    """Return the memory that each of several workers, of these kinds and tasks, has to itself."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__, str(scratch), *(" ".join(kind) for kind in kinds)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(scratch), "OMP_NUM_THREADS": "1"},
    ) as process:
        lines = [process.stdout.readline() if process.stdout else "" for _ in kinds]
        if not all(lines):
            raise RuntimeError("A worker of the benchmark failed; it says why above.")
        # All hold their memory now, so that what they share shows.
        ready = sorted((int(number), int(pid)) for number, pid in map(str.split, lines))
        return [_own_megabytes(pid) for _, pid in ready]


def _own_megabytes(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE))
    return (int(found["Private_Clean"]) + int(found["Private_Dirty"])) / 1e3


def _work(kinds: Sequence[str], scratch: str) -> int:
    """Import once, and let each worker be a copy of this process."""
    import torch

    import fedlora_flwr.client_app
    import fedlora_flwr.clients.trainer  # noqa: F401 - before the copies are made

    torch.set_num_threads(1)
    workers = []
    for number, words in enumerate(kinds):
        if (worker := os.fork()) == 0:
            try:
                _hold(number, *words.split(), scratch=scratch)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        workers.append(worker)
    failed = 0
    while workers:
        worker, status = os.wait()
        workers.remove(worker)
        if status:
            failed = 1
            for other in workers:  # Nobody waits for them now.
                os.kill(other, signal.SIGKILL)
    return failed


def _hold(number: int, kind: str, task: str, *, scratch: str) -> None:
    from fedlora_flwr.clients.trainer import process_trainer
    from fedlora_flwr.config import RunConfig

    config = RunConfig.of(
        {"task": task, "device": "cpu", "rank": 4, "share-weights": kind == "shared",
         "state-dir": scratch, "run-dir": scratch}
    )  # fmt: skip
    kept = process_trainer(config)
    os.write(sys.stdout.fileno(), f"{number} {os.getpid()}\n".encode())
    sys.stdin.read()
    del kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Get workers ready for private steps, and wait until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=main.__doc__)
    parser.add_argument("scratch", help="folder for ledger and results")
    parser.add_argument("kinds", nargs="+", help="'shared module:Class' or 'apart module:Class'")
    given = parser.parse_args(arguments)
    return _work(given.kinds, given.scratch)


if __name__ == "__main__":
    sys.exit(main())
