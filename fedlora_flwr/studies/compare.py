"""Compare methods at several privacy budgets, with rates that are tuned on equally many runs."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from rich.console import Console

from fedlora_flwr.files import replace_file
from fedlora_flwr.plots.accuracy import plot_accuracy
from fedlora_flwr.processes.lifeline import scratch
from fedlora_flwr.processes.workers import Execute, executor
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.studies.compare_results import (
    COLUMNS,
    Journal,
    Pair,
    Rates,
    Row,
    check_settings,
    claim,
    data_name,
    summarize,
)
from fedlora_flwr.studies.compare_tables import document_of, markdown
from fedlora_flwr.studies.comparison import Comparison, Job
from fedlora_flwr.studies.latex import latex
from fedlora_flwr.studies.metric import metric_of
from fedlora_flwr.studies.paired import Findings, findings
from fedlora_flwr.studies.progress import write_progress
from fedlora_flwr.studies.trials import trial_jobs
from fedlora_flwr.wire import OWN_LABELS

OnRow = Callable[[Row | None, int, int], None]


def run_comparison(
    comparison: Comparison,
    folder: Path,
    on_row: OnRow,
    workers: int = 1,
    console: Console | None = None,
) -> tuple[pd.DataFrame, Findings]:
    """Run the unfinished runs, and write ``rows.csv``, tables and ``accuracy.png``.

    Parameters
    ----------
    comparison : Comparison
        What is compared.
    folder : Path
        The folder of results. Runs of an earlier call with the same settings are kept.
    on_row : callable
        Called with each newly finished row, how many are done, and how many there will be. The
        first call has None instead of a row and comes after the checks.
    workers : int (default: 1)
        Runs at a time; 1 runs them in this process.
    console : Console, optional
        Shows the progress of the checks if it is a terminal.

    Returns
    -------
    tuple[pandas.DataFrame, Findings]
        The summary (see `fedlora_flwr.studies.compare_results.summarize`), and what the runs say
        beside it.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or the folder holds a comparison with other settings.
    FedLoRAError
        Another process works in the folder, or a worker was killed; finished runs are kept.
    """
    document = comparison.document()
    _ = comparison.compared_with  # An unknown reference is an error before any work.
    check_settings(folder, document)
    comparison.check(console)
    metric = metric_of(comparison.config)
    with claim(folder, document), scratch("fedlora-compare-") as working:
        journal = Journal(folder / "rows.csv")
        begin = partial(write_progress, folder, workers)
        with executor(workers, folder / "compare.log") as execute, _one_prefix():
            run = partial(_run, working)
            chosen = _run_all(comparison, journal, execute, run, on_row, begin)
        rows = [journal.rows[job.key] for job in comparison.report_jobs(chosen)]
        summary = summarize(rows, chosen, comparison.seeds)
        found = findings(comparison, journal.rows, chosen)
        about = comparison.config, metric, comparison.trials, found, comparison.sampler
        parts = document_of(summary, *about)
        replace_file(folder / "table.tex", latex(parts).encode())
        replace_file(folder / "table.md", markdown(parts).encode())
        runs = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"final": float})
        plot_accuracy(runs, folder / "accuracy.png", metric, data_name(comparison.config))
    return summary, found


def _run_all(
    comparison: Comparison,
    journal: Journal,
    execute: Execute,
    run: Callable[[Job], Row],
    on_row: OnRow,
    begin: Callable[[Sequence[Job], Sequence[Pair], int], None],
) -> dict[Pair, Rates | None]:
    tried: list[Job] = []

    def work(jobs: Sequence[Job], before: int, total: int, later: Sequence[Pair] = ()) -> None:
        waiting = [job for job in jobs if job.key not in journal.rows]
        begin(waiting, later, total)
        done = before + len(jobs) - len(waiting)
        on_row(None, done, total)
        for count, row in enumerate(execute(run, waiting), start=done + 1):
            journal.append(row)
            on_row(row, count, total)

    left = Counter({pair: comparison.trials_of(pair[0]) for pair in comparison.pairs})
    for trials in trial_jobs(comparison, journal.rows):
        left.subtract(job.pair for job in trials)
        later = [*left.elements(), *comparison.pairs * comparison.seeds]
        work(trials, len(tried), comparison.most_runs, later)
        tried += trials
    chosen = comparison.choose(journal.rows, tried)
    jobs = [*comparison.report_jobs(chosen), *comparison.control_jobs(chosen)]
    work(jobs, len(tried), len(tried) + len(jobs))
    return chosen


@contextmanager
def _one_prefix() -> Iterator[None]:
    """Forget what runs in this process have kept for later ones, once the block has ended."""
    from fedlora_flwr.lora.prefix_cache import PrefixCache

    try:
        yield
    finally:
        PrefixCache.keep_between_runs(False)


def _run(working: Path, job: Job) -> Row:
    """Run one job. An error becomes the job's result."""
    from fedlora_flwr.lora.prefix_cache import PrefixCache
    from fedlora_flwr.simulations.runner import prepare_run, run_in_process

    PrefixCache.keep_between_runs(True)  # A worker process forgets it when it ends.
    lr_a, lr_b, lr_head = job.rates
    row: Row = {
        "phase": job.phase, "row": job.row, "epsilon": job.config.epsilon, "seed": job.config.seed,
        "lr-a": lr_a, "lr-b": lr_b, "lr-head": lr_head, "strategy": job.config.strategy,
    }  # fmt: skip
    started = time.perf_counter()
    try:
        metric = metric_of(job.config)
        with tempfile.TemporaryDirectory(dir=working) as folder:
            run_dir = RunDirectory(Path(folder))
            summary = run_in_process(prepare_run(job.config), run_dir, lambda _: None)
    except Exception as error:  # The other runs continue in any case.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {**row, "seconds": time.perf_counter() - started, "error": text}
    return {
        **row,
        "initial": summary[f"initial_{metric}"],
        "final": summary[f"final_{metric}"],
        "epsilon_max": summary["epsilon_max"],
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "failures": summary["failures"],
        "seconds": time.perf_counter() - started,
        "error": "",
        "own_labels": summary.get(f"final_{OWN_LABELS}", math.nan),
    }
