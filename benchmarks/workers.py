"""Measures the memory of one more worker process beyond its imports."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
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

    All import the same libraries, so that memory pages of libraries are shared.
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
    """Return the unshared memory of each of several workers of these kinds and tasks."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, kind, task, str(scratch)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(scratch), "OMP_NUM_THREADS": "1"},
        )
        for kind, task in kinds
    ]
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("A worker of the benchmark failed; it says why above.")
        # All workers hold their memory at this point, so shared pages can be recognized.
        return [_own_megabytes(process.pid) for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")


def _own_megabytes(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE))
    return (int(found["Private_Clean"]) + int(found["Private_Dirty"])) / 1e3


def _work(kind: str, task: str, scratch: str) -> None:
    import torch

    import fedlora_flwr.client_app  # noqa: F401
    from fedlora_flwr.clients.trainer import process_trainer
    from fedlora_flwr.config import RunConfig

    torch.set_num_threads(1)
    config = RunConfig.of(
        {"task": task, "device": "cpu", "rank": 4, "share-weights": kind == "shared",
         "state-dir": scratch, "run-dir": scratch}
    )  # fmt: skip
    kept = process_trainer(config)
    print("ready", flush=True)
    sys.stdin.readline()
    del kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Get ready for private steps as a worker does, and wait for a line of input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=main.__doc__)
    parser.add_argument("kind", choices=("shared", "apart"))
    parser.add_argument("task", help="module:Class")
    parser.add_argument("scratch", help="folder for ledger and results")
    given = parser.parse_args(arguments)
    _work(given.kind, given.task, given.scratch)


if __name__ == "__main__":
    main()
