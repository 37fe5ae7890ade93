"""The private step at full size on a GPU: compared with PEFT, bf16 with fp32, and more workers."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import Figure, peak_bytes, take_turns
from benchmarks.rounds import time_rounds
from benchmarks.step import Bars, Shape, StepBench, measure, roberta, swin
from benchmarks.tasks import ShapeTask
from fedlora_flwr.config import RunConfig
from fedlora_flwr.lora.compiled import compile_backbone
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.processes.workers import log_to_file
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run

BARS = Bars(narrow=1.05, all_linears=1.05, memory=None)
HALF_BAR = 0.5
EAGER = "not compiled"
SKIPPED = "skipped: no CUDA GPU here"


def swin_base() -> Shape:
    """Return Swin-B on 224×224 pictures."""
    return swin("Swin-B", "swin_base_patch4_window7_224")


def roberta_large() -> Shape:
    """Return RoBERTa-large on 128 tokens."""
    return roberta(
        "RoBERTa-large",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )


@dataclass(frozen=True)
class Setting:
    """Models with their batches, and the numbers of worker processes that share the GPU."""

    steps: tuple[tuple[Shape, int], ...]
    workers: tuple[int, ...] = (1, 2, 4)
    repetitions: int = 7
    rounds: int = 6


def full_size() -> Setting:
    """Return the setting that is measured on a GPU."""
    return Setting(((swin_base(), 16), (swin_base(), 64), (roberta_large(), 128)))


def measure_gpu(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Measure steps, precision and workers. Without a GPU, only say what is skipped."""
    if not torch.cuda.is_available():
        for what, unit, against, bar in _planned(setting):
            on_figure(Figure(what, None, None, unit, against, bar, SKIPPED))
        return
    device = torch.device("cuda")
    for shape, records in setting.steps:
        measure([shape], records, setting.repetitions, device, on_figure, rivals=False, bars=BARS)
        on_figure(_precision(shape, records, setting.repetitions, device))
        on_figure(_compiled(shape, records, setting.repetitions, device))
        torch.cuda.empty_cache()
    seconds = {workers: _round(workers, setting.rounds) for workers in setting.workers}
    for workers, (what, unit, against, bar) in zip(
        setting.workers[1:], _worker_figures(setting), strict=True
    ):
        on_figure(Figure(what, seconds[workers], seconds[setting.workers[0]], unit, against, bar))


Planned = tuple[str, str, str, float | None]


def _planned(setting: Setting) -> list[Planned]:
    steps: list[Planned] = []
    for shape, records in setting.steps:
        for layers in shape.targets:
            what = f"{shape.name}, b = {records}, {layers}, A, B and AB: time"
            steps.append((what, "s", "plain PEFT", BARS.time(layers)))
        steps.append((_precision_title(shape, records), "s", "fp32", HALF_BAR))
        steps.append((_compiled_title(shape, records), "s", EAGER, None))
    return [*steps, *_worker_figures(setting)]


def _worker_figures(setting: Setting) -> list[Planned]:
    first, *others = setting.workers
    return [
        (f"a round of eight clients, {n} workers on one GPU", "s", f"{first} worker", None)
        for n in others
    ]


def _precision_title(shape: Shape, records: int) -> str:
    return f"{shape.name}, b = {records}, AB: private step in bf16"


def _precision(shape: Shape, records: int, repetitions: int, device: torch.device) -> Figure:
    layers, targets = next(iter(shape.targets.items()))
    calls, memory = {}, {}
    for name in ("fp32", "bf16"):
        bench = StepBench(shape, targets, records, device)
        if name == "bf16":
            run_in_bf16(bench.engine.adapted.model)
        calls[name] = bench.call()
        memory[name] = peak_bytes(calls[name]) / 1e6
    seconds = take_turns(calls, repetitions)
    note = (
        f"{layers}; {records / seconds['bf16']:.0f} against {records / seconds['fp32']:.0f} "
        f"records/s, peak {memory['bf16']:.0f} against {memory['fp32']:.0f} MB"
    )
    return Figure(
        _precision_title(shape, records),
        seconds["bf16"], seconds["fp32"], "s", "fp32", HALF_BAR, note,
    )  # fmt: skip


def _compiled_title(shape: Shape, records: int) -> str:
    return f"{shape.name}, b = {records}, AB: private step in bf16, compiled"


def _compiled(shape: Shape, records: int, repetitions: int, device: torch.device) -> Figure:
    layers, targets = next(iter(shape.targets.items()))
    calls = {}
    for backend in ("none", "inductor"):
        bench = StepBench(shape, targets, records, device)
        run_in_bf16(bench.engine.adapted.model)
        if backend != "none":
            compile_backbone(bench.engine.adapted, backend)
        calls[backend] = bench.call()
    seconds = take_turns(calls, repetitions)
    title = _compiled_title(shape, records)
    return Figure(title, seconds["inductor"], seconds["none"], "s", EAGER, None, layers)


def _round(workers: int, rounds: int) -> float:
    """Return the median seconds of a round of eight clients on the first GPU."""
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as scratch:
        folder = Path(scratch)
        log_to_file(folder / "flower.log")
        run_dir = RunDirectory(folder / "run")
        prepared = prepare_run(
            RunConfig.of(
                {
                    "task": "benchmarks.gpu:Pictures",
                    "strategy": "dp-lora",
                    "num-clients": 8,
                    "num-rounds": rounds + 1,
                    "eval-every": rounds + 1,
                    "rank": 8,
                    "local-steps": 5,
                    "batch-size": 16,
                    "device": "cuda",
                    "reproducible": True,
                    "run-dir": str(run_dir.path),
                    "state-dir": str(run_dir.path),
                }
            )
        )
        return statistics.median(time_rounds(prepared, run_dir, workers=workers))


class Pictures(ShapeTask):
    """Random pictures for Swin-B."""

    def shape(self) -> Shape:
        """Return the model and its input."""
        return swin_base()
