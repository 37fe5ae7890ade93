"""What Flower messages cost in this process, and how soon a run gets to its first round."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.bench.figures import Figure
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.plan import BOTH, ComponentPlan
from fedlora_flwr.simulations.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import make_plan, run_in_process
from fedlora_flwr.simulations.workers import log_to_file
from fedlora_flwr.tasks.classification import evaluate_classifier
from fedlora_flwr.tasks.records import TensorRecords

WIDTH, DEPTH = 768, 32
MESSAGE_BAR, START_BAR = 2.0, 1 / 3


class Stack:
    """A task whose model has adapters of 1.5 MB and trains in no time.

    Parameters
    ----------
    settings : RunConfig
        The run.
    """

    name = "stack"
    metric = "accuracy"
    lora_targets = r"body\.\d+"
    head = ("head",)

    def __init__(self, settings: Any) -> None:
        del settings
        draw = torch.Generator().manual_seed(0)
        self._records = TensorRecords(
            {"x": torch.randn(64, WIDTH, generator=draw), "label": torch.arange(64) % 2}
        )

    def build_model(self) -> nn.Module:
        """Return the model with random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
            return nn.ModuleDict({"body": body, "head": nn.Linear(WIDTH, 2)})

    def client_records(self, partition_id: int, num_partitions: int) -> TensorRecords:
        """Return the same 64 records for every client."""
        del partition_id, num_partitions
        return self._records

    def test_records(self) -> TensorRecords:
        """Return those records, too."""
        return self._records

    def losses(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return one loss a record."""
        return F.cross_entropy(self._scores(model, batch), batch["label"], reduction="none")

    def evaluate(self, model: Any, records: TensorRecords) -> dict[str, float]:
        """Return loss and accuracy."""
        return evaluate_classifier(model, records, lambda batch: self._scores(model, batch))

    def _scores(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        scores: Tensor = model.head(model.body(batch["x"]))
        return scores


@dataclass(frozen=True)
class Setting:
    """How many clients a round has, and how many rounds and starts are measured."""

    clients: int = 20
    rounds: int = 9
    starts: int = 5


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Measure the overhead of a client's message, then starts with and without Ray in turns."""
    on_figure(_message(setting))
    on_figure(_start(setting))


def _message(setting: Setting) -> Figure:
    """Compare rounds with a bare loop over the same private training, in turns."""
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        log_to_file(folder / "flower.log")
        run_dir = RunDirectory(folder / "run")
        plan = make_plan(stack_config(run_dir.path, setting.clients, setting.rounds + 1))
        seconds: dict[str, list[float]] = {"round": [], "bare": []}
        mark = time.perf_counter()

        def after(row: dict[str, Any]) -> None:
            nonlocal mark
            if row["round"] > 1:  # The first builds the model.
                seconds["round"].append(time.perf_counter() - mark)
                seconds["bare"].append(_bare_loop(plan.config, plan.mechanisms[0], setting.clients))
            mark = time.perf_counter()

        run_in_process(plan, run_dir, after)
    overhead = statistics.median(seconds["round"]) - statistics.median(seconds["bare"])
    return Figure(
        f"overhead of a client's message, adapters of {4e-6 * 2 * 8 * WIDTH * DEPTH:.1f} MB",
        max(overhead, 0.0) / setting.clients * 1e3,
        MESSAGE_BAR,
        "ms",
        "what is allowed over a bare training loop",
        1.0,
    )


def _bare_loop(config: RunConfig, mechanism: Any, clients: int) -> float:
    trainer = process_trainer(config)
    records = trainer.task.client_records(0, clients)
    begin = time.perf_counter()
    for client in range(clients):
        trainer.train(trainer.start, ComponentPlan.uniform(BOTH), records, mechanism, (client, 0))
    return time.perf_counter() - begin


def stack_config(folder: Path, clients: int, rounds: int, **changes: Any) -> RunConfig:
    """Return a run of `Stack` whose results go to a folder; every client takes part by default."""
    return RunConfig.of(
        {
            "task": "fedlora_flwr.bench.engine:Stack",
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
            "min-clients": 2,
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
