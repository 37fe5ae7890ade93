"""All benchmarks by name, one after the other, with progress, a table and a file."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from benchmarks.figures import Figure, table, write
from fedlora_flwr.errors import unknown
from fedlora_flwr.terminal import show, show_line, show_lines

OnFigure: TypeAlias = Callable[[Figure], None]
Benchmark: TypeAlias = Callable[[OnFigure], None]


def private_step(on_figure: OnFigure) -> None:
    """Compare the private step with plain PEFT without privacy, and with Opacus' own."""
    from benchmarks.step import measure, roberta, swin

    shapes = [swin(), roberta()]
    torch.set_num_threads(os.cpu_count() or 1)
    measure(shapes, records=4, repetitions=5, device=torch.device("cpu"), on_figure=on_figure)


def distance_to_the_limit(on_figure: OnFigure) -> None:
    """Compare the private step with its matrix products alone, in fp32 and bf16."""
    from benchmarks.limit import measure
    from benchmarks.step import roberta, swin

    threads = sorted({1, os.cpu_count() or 1})
    measure([roberta(), swin()], 4, repetitions=5, on_figure=on_figure, threads=threads)


def one_factor_per_step(on_figure: OnFigure) -> None:
    """Compare steps that train A and B in turn with steps that train both."""
    from benchmarks.alternation import measure
    from benchmarks.step import roberta, swin

    torch.set_num_threads(os.cpu_count() or 1)
    measure([swin(), roberta()], 4, 9, torch.device("cpu"), on_figure)


def growth(on_figure: OnFigure) -> None:
    """Show how a step's cost grows with rank, records and model."""
    from benchmarks.growth import Setting, measure

    measure(Setting(), on_figure)


def published_way(on_figure: OnFigure) -> None:
    """Compare a round on short texts with a round as public scripts run it."""
    from benchmarks.published import Setting, measure

    measure(Setting(), on_figure)


def in_process(on_figure: OnFigure) -> None:
    """Compare the in-process engine with a bare training loop, and its start with Ray's."""
    from benchmarks.engine import Setting, measure

    measure(Setting(), on_figure)


def registered_clients(on_figure: OnFigure) -> None:
    """Compare rounds of ten clients out of up to 10,000 with rounds of ten out of ten."""
    from benchmarks.clients import Setting, measure

    measure(Setting(), on_figure)


def million_clients(on_figure: OnFigure) -> None:
    """Compare rounds of 100 clients out of up to a million with rounds of all of 100."""
    from benchmarks.clients import MILLION, measure

    measure(MILLION, on_figure)


def client_start(on_figure: OnFigure) -> None:
    """Compare a device's process, started for each message, with the plain way to start."""
    from benchmarks.start import Setting, measure

    measure(Setting(), on_figure)


def long_runs(on_figure: OnFigure) -> None:
    """Compare the last of 1,000 rounds with early ones, and size what such a run leaves."""
    from benchmarks.long_runs import Setting, measure

    measure(Setting(), on_figure)


def frozen_prefix(on_figure: OnFigure) -> None:
    """Compare steps that look frozen layers' activations up with steps that compute them."""
    from benchmarks.prefix import Setting, measure

    measure(Setting(), on_figure)


def forecast_memory(on_figure: OnFigure) -> None:
    """Compare the memory that `fedlora plan` forecasts with what a private step takes."""
    from benchmarks.memory import five_shapes, measure

    measure(five_shapes(), records=4, on_figure=on_figure)


def worker_memory(on_figure: OnFigure) -> None:
    """Weigh one more worker process that shares the frozen weights with the others."""
    from benchmarks.workers import Setting, measure

    measure(Setting(), on_figure)


def ray_clusters(on_figure: OnFigure) -> None:
    """Compare rounds on Ray clusters of two and four nodes with rounds on one node."""
    from benchmarks.ray_cluster import Setting, measure

    measure(Setting(), on_figure)


def masked_sums(on_figure: OnFigure) -> None:
    """Weigh the masks of a secure sum: time and bytes of 10, 30 and 100 clients."""
    from benchmarks.masking import Setting, measure

    measure(Setting(), on_figure)


def correlated_noise(on_figure: OnFigure) -> None:
    """Say by calculation what correlated noise would gain under a secure sum."""
    from benchmarks.correlated import measure

    measure(on_figure)


def on_a_gpu(on_figure: OnFigure) -> None:
    """Compare full-size steps on a GPU with plain PEFT, bf16 with fp32, workers with one."""
    from benchmarks.gpu import full_size, measure_gpu

    measure_gpu(full_size(), on_figure)


def attacks(on_figure: OnFigure) -> None:
    """Show what bad clients do under each rule, in hours; a second call continues the first."""
    from benchmarks.attacks import RESULTS, cells, measure

    for cell, outcome in measure(cells(), RESULTS):
        what = f"{cell.strategy}, ε = {cell.epsilon:g}, {cell.bad} bad: {cell.attack}"
        on_figure(Figure(what, outcome.accuracy, None, "accuracy", cell.rule))


BENCHMARKS: Mapping[str, Benchmark] = {
    "step": private_step,
    "limit": distance_to_the_limit,
    "alternation": one_factor_per_step,
    "growth": growth,
    "engine": in_process,
    "clients": registered_clients,
    "million": million_clients,
    "start": client_start,
    "long_runs": long_runs,
    "prefix": frozen_prefix,
    "memory": forecast_memory,
    "workers": worker_memory,
    "published": published_way,
    "ray_cluster": ray_clusters,
    "masking": masked_sums,
    "correlated": correlated_noise,
    "attacks": attacks,
    "gpu": on_a_gpu,
}


BY_NAME_ONLY = (
    "limit", "alternation", "growth", "million", "start", "long_runs", "prefix",
    "ray_cluster", "masking", "correlated", "attacks", "gpu",
)  # fmt: skip
"""What `run_suite` leaves out unless named: no bar, no matter of simulations, long, or for a GPU.
"""


def run_suite(
    names: Sequence[str], output: Path | None, console: Console
) -> dict[str, list[Figure]]:
    """Run benchmarks, print a table for each, and write a JSON file if one is named.

    Parameters
    ----------
    names : Sequence[str]
        Keys of `BENCHMARKS`; empty for all but `BY_NAME_ONLY`.
    output : Path or None
        File for figures, machine and versions.
    console : Console
        The console for progress and tables.

    Returns
    -------
    dict[str, list[Figure]]
        The figures of each benchmark.

    Raises
    ------
    InvalidValue
        A name is not that of a benchmark.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    _quiet()
    found: dict[str, list[Figure]] = {}
    begin = time.perf_counter()
    for name in names or [name for name in BENCHMARKS if name not in BY_NAME_ONLY]:
        figures = found[name] = []
        torch.set_num_threads(1)  # A benchmark may set another number.
        with console.status(f"{name}: starting") as status:

            def told(figure: Figure, name: str = name, figures: list[Figure] = figures) -> None:
                figures.append(figure)
                status.update(f"{name}: {len(figures)} figures, last {figure.what}")

            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Those of other libraries and of models.
                BENCHMARKS[name](told)
            seconds = time.perf_counter() - started
        title = f"{name}: {(BENCHMARKS[name].__doc__ or '').strip()} ({seconds:.0f} s)"
        show_line(console, title)
        show(console, table(figures))
    if output:
        command = " ".join(["python -m benchmarks", *names])
        write(output, command, found, time.perf_counter() - begin)
        show_lines(console, [("Results", str(output))])
    return found


def _quiet() -> None:
    """Keep other output off the screen, which shows our own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
