"""Compare methods at several privacy budgets, with rates that are tuned on equally many runs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from fedlora_flwr.config import RunConfig
from fedlora_flwr.files import replace_file
from fedlora_flwr.plots.accuracy import plot_accuracy
from fedlora_flwr.processes.lifeline import scratch
from fedlora_flwr.processes.workers import Execute, executor
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.studies.compare_methods import RATES, Method, settings_of
from fedlora_flwr.studies.compare_results import (
    COLUMNS,
    Journal,
    Pair,
    Rates,
    Row,
    RowKey,
    check_settings,
    claim,
    data_name,
    document_of,
    markdown,
    summarize,
)
from fedlora_flwr.tasks.registry import build_task

# Reported seeds start at 1, so rates are chosen on another partition, noise and cohort.
TUNING_SEED = 0
# The smallest and largest multiple of the recipe's rate that are tried.
RANGES = {"lr-a": (0.04, 4.0), "lr-b": (0.1, 4.0), "lr-head": (0.1, 2.0)}

OnRow = Callable[[Row | None, int, int], None]


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Parameters
    ----------
    phase : str
        ``"tune"`` or ``"report"``.
    row : str
        Name of the method's row.
    config : RunConfig
        The run.
    """

    phase: str
    row: str
    config: RunConfig

    @property
    def pair(self) -> Pair:
        """Row and ε."""
        return self.row, self.config.epsilon

    @property
    def rates(self) -> Rates:
        """Learning rates of A, B and head."""
        return self.config.lr_a, self.config.lr_b, self.config.lr_head

    @property
    def key(self) -> RowKey:
        """The job's row in the journal."""
        return (self.phase, *self.pair, self.config.seed, *self.rates)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Parameters
    ----------
    config : RunConfig
        The settings that all runs share. Strategy, epsilon, seed and learning rates are replaced.
    methods : tuple[Method, ...]
        Rows of the table.
    epsilons : tuple[float, ...]
        Privacy budgets; infinity means no privacy.
    seeds : int
        Reported seeds are 1 to ``seeds``.
    trials : int
        How many settings of the learning rates are tried per row and ε; 0 takes those of the
        configuration. A rate that a row sets itself is never changed.
    """

    config: RunConfig
    methods: tuple[Method, ...]
    epsilons: tuple[float, ...]
    seeds: int
    trials: int

    @property
    def pairs(self) -> list[Pair]:
        """Every row at every ε, ordered by ε so that consecutive runs share calibrations."""
        return [(method.name, epsilon) for epsilon in self.epsilons for method in self.methods]

    def candidates(self, row: str) -> list[Rates]:
        """Return a row's candidate rates: its own, then multiples of them within `RANGES`.

        The multiples are points of a Halton sequence on a logarithmic scale. It is not scrambled,
        so it is the same in every version of SciPy. A longer list begins with the shorter one.
        """
        from scipy.stats import qmc  # type: ignore[import-untyped,unused-ignore]

        method = self._method(row)
        config = method.of(self.config)
        own = (config.lr_a, config.lr_b, config.lr_head)
        points = qmc.Halton(d=len(RANGES), scramble=False)
        points.fast_forward(1)  # Its first point is the corner of the smallest rates.
        spread = (_spread(point, own) for point in points.random(max(self.trials - 1, 0)))
        kept = [name in method.settings for name in RATES]
        fixed = [tuple(np.where(kept, own, rates).tolist()) for rates in spread]
        return list(dict.fromkeys([own, *fixed]))  # A row that sets every rate has one candidate.

    def tune_jobs(self) -> list[Job]:
        """Return the runs by which rates are chosen."""
        if not self.trials:
            return []
        candidates = {method.name: self.candidates(method.name) for method in self.methods}
        return [
            self._job("tune", pair, TUNING_SEED, rates)
            for pair in self.pairs
            for rates in candidates[pair[0]]
        ]

    def choose(self, rows: Mapping[RowKey, Row]) -> dict[Pair, Rates | None]:
        """Return the rates with which each pair ended best, the first ones if several are equal.

        A pair has None if every trial failed.
        """
        if not self.trials:
            return self._own()
        chosen: dict[Pair, Rates | None] = dict.fromkeys(self.pairs)
        best: dict[Pair, float] = {}
        for job in self.tune_jobs():
            row = rows[job.key]
            if not row["error"] and row["final"] > best.get(job.pair, -math.inf):
                best[job.pair], chosen[job.pair] = row["final"], job.rates
        return chosen

    def report_jobs(self, chosen: Mapping[Pair, Rates | None]) -> list[Job]:
        """Return the runs that are reported. A pair without rates has none."""
        return [
            self._job("report", pair, seed, rates)
            for seed in range(1, self.seeds + 1)
            for pair, rates in chosen.items()
            if rates is not None
        ]

    def check(self, console: Console | None = None) -> None:
        """Refuse settings that cannot run, before anything runs.

        Raises
        ------
        InvalidValue
            A setting cannot be used, or a client could not keep its promise.
        """
        from fedlora_flwr.privacy.budget import check_budget
        from fedlora_flwr.simulations.runner import prepare_run

        jobs = [*self.tune_jobs(), *self.report_jobs(self._own())]
        batches = {(j.config.epsilon, j.config.batch_size, j.config.seed): j.config for j in jobs}
        for config in batches.values():
            task = build_task(config.task, config)
            for client in range(config.num_clients):
                records = task.client_records(client, config.num_clients)
                if config.private:
                    batch = 1 if config.secure_sum else config.batch_size
                    check_budget(config.epsilon, config.delta, batch, len(records))
        # The runs use the cached calibrations of these checks.
        for config in {job.row: job.config for job in reversed(jobs)}.values():
            prepare_run(config, console)

    def document(self) -> dict[str, Any]:
        """Return the settings for ``settings.json``. ε is text, because JSON has no infinity."""
        replaced = ("strategy", "epsilon", "seed")
        return {
            **{key: value for key, value in self.config.items().items() if key not in replaced},
            "rows": settings_of(self.methods),
            "epsilons": [str(epsilon) for epsilon in self.epsilons],
            "seeds": self.seeds,
            "trials": self.trials,
        }

    def _method(self, row: str) -> Method:
        return next(method for method in self.methods if method.name == row)

    def _own(self) -> dict[Pair, Rates | None]:
        """Return every pair with the rates of its row, without tuning."""
        return {pair: self.candidates(pair[0])[0] for pair in self.pairs}

    def _job(self, phase: str, pair: Pair, seed: int, rates: Rates) -> Job:
        row, epsilon = pair
        config = self._method(row).of(replace(self.config, epsilon=epsilon, seed=seed))
        a, b, head = rates
        return Job(phase, row, replace(config, lr_a=a, lr_b=b, lr_head=head))


def run_comparison(
    comparison: Comparison,
    folder: Path,
    on_row: OnRow,
    workers: int = 1,
    console: Console | None = None,
) -> pd.DataFrame:
    """Run the unfinished runs, and write ``rows.csv``, ``table.md`` and ``accuracy.png``.

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
    pandas.DataFrame
        See `fedlora_flwr.studies.compare_results.summarize`.

    Raises
    ------
    InvalidValue
        A setting cannot be used, or the folder holds a comparison with other settings.
    FedLoRAError
        Another process works in the folder, or a worker was killed; finished runs are kept.
    """
    document = comparison.document()
    check_settings(folder, document)
    comparison.check(console)
    metric = build_task(comparison.config.task, comparison.config).metric
    with claim(folder, document), scratch("fedlora-compare-") as working:
        journal = Journal(folder / "rows.csv")
        with executor(workers, folder / "compare.log") as execute:
            chosen = _run_all(comparison, journal, execute, partial(_run, working), on_row)
        rows = [journal.rows[job.key] for job in comparison.report_jobs(chosen)]
        summary = summarize(rows, chosen, comparison.seeds)
        parts = document_of(summary, comparison.config, metric, comparison.trials)
        replace_file(folder / "table.md", markdown(parts).encode())
        runs = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"final": float})
        plot_accuracy(runs, folder / "accuracy.png", metric, data_name(comparison.config))
    return summary


def _run_all(
    comparison: Comparison,
    journal: Journal,
    execute: Execute,
    run: Callable[[Job], Row],
    on_row: OnRow,
) -> dict[Pair, Rates | None]:
    tune = comparison.tune_jobs()
    total = len(tune) + len(comparison.pairs) * comparison.seeds

    def work(jobs: Sequence[Job], before: int) -> None:
        waiting = [job for job in jobs if job.key not in journal.rows]
        done = before + len(jobs) - len(waiting)
        on_row(None, done, total)
        for count, row in enumerate(execute(run, waiting), start=done + 1):
            journal.append(row)
            on_row(row, count, total)

    work(tune, 0)
    chosen = comparison.choose(journal.rows)
    work(comparison.report_jobs(chosen), len(tune))
    return chosen


def _run(working: Path, job: Job) -> Row:
    """Run one job. An error becomes the job's result."""
    from fedlora_flwr.simulations.runner import prepare_run, run_in_process

    lr_a, lr_b, lr_head = job.rates
    row: Row = {
        "phase": job.phase, "row": job.row, "epsilon": job.config.epsilon, "seed": job.config.seed,
        "lr-a": lr_a, "lr-b": lr_b, "lr-head": lr_head, "strategy": job.config.strategy,
    }  # fmt: skip
    started = time.perf_counter()
    try:
        metric = build_task(job.config.task, job.config).metric
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
    }


def _spread(point: Sequence[float], own: Rates) -> Rates:
    """Place a point of the unit cube in `RANGES` around the own rates, to three digits."""
    places = zip(own, point, RANGES.values(), strict=True)
    a, b, head = (float(f"{rate * low * (high / low) ** u:.3g}") for rate, u, (low, high) in places)
    return a, b, head
