"""What is compared: rows, budgets and seeds, and the runs that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.studies.baseline_names import HEAD_ONLY, NO_NOISE, NO_PRIVACY
from fedlora_flwr.studies.compare_methods import RATES, Method, settings_of
from fedlora_flwr.studies.compare_results import CONTROL, REPORT, TUNE, Pair, Rates, Row, RowKey
from fedlora_flwr.studies.sampler_names import HALTON, OPTUNA
from fedlora_flwr.tasks.registry import build_task, client_sizes

# Reported seeds start at 1, so rates are chosen on another partition, noise and cohort.
TUNING_SEED = 0
# The smallest and largest multiple of the recipe's rate that are tried.
RANGES = {"lr-a": (0.04, 4.0), "lr-b": (0.1, 4.0), "lr-head": (0.1, 2.0)}


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Parameters
    ----------
    phase : str
        ``"tune"``, ``"report"``, or ``"control"``: the same run without noise.
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
        Rows of the table that the user names.
    epsilons : tuple[float, ...]
        Privacy budgets that the user names; infinity means no privacy.
    seeds : int
        Reported seeds are 1 to ``seeds``.
    trials : int
        How many settings of the learning rates are tried per row and ε; 0 takes those of the
        configuration. A rate that a row sets itself is never changed.
    baselines : tuple[str, ...] (default: ())
        Names of `BASELINES` that are added.
    reference : str (default: "")
        The row from which differences are taken; by default the first row of ``head-only``, or the
        first row.
    sampler : str (default: "halton")
        What chooses the rates to try, one of `SAMPLERS`. The number of trials is the same.
    """

    config: RunConfig
    methods: tuple[Method, ...]
    epsilons: tuple[float, ...]
    seeds: int
    trials: int
    baselines: tuple[str, ...] = ()
    reference: str = ""
    sampler: str = HALTON

    @property
    def rows(self) -> tuple[Method, ...]:
        """All rows: those that the user names, and the head alone if it is a baseline."""
        known = any(method.strategy == HEAD_ONLY for method in self.methods)
        added = () if known or HEAD_ONLY not in self.baselines else (Method(HEAD_ONLY, HEAD_ONLY),)
        return (*self.methods, *added)

    @property
    def budgets(self) -> tuple[float, ...]:
        """All budgets: those that the user names, and infinity if it is a baseline."""
        added = {math.inf} if NO_PRIVACY in self.baselines else set()
        return tuple(sorted({*self.epsilons, *added}))

    @property
    def compared_with(self) -> str:
        """Name of the row from which differences are taken.

        Raises
        ------
        InvalidValue
            ``reference`` is not a row.
        """
        names = [method.name for method in self.rows]
        if self.reference and self.reference not in names:
            raise InvalidValue("reference", self.reference, f"one of the rows {names}")
        heads = [method.name for method in self.rows if method.strategy == HEAD_ONLY]
        return self.reference or (heads or names)[0]

    @property
    def pairs(self) -> list[Pair]:
        """Every row at every ε, ordered by ε so that consecutive runs share calibrations."""
        return [(method.name, epsilon) for epsilon in self.budgets for method in self.rows]

    @property
    def most_runs(self) -> int:
        """How many runs there are at most. Controls that equal other runs are known only later."""
        trials = sum(self.trials_of(row.name) for row in self.rows)
        runs = len(self.budgets) * (trials + len(self.rows) * self.seeds)
        private = sum(map(math.isfinite, self.budgets))
        if NO_NOISE not in self.baselines or not private:
            return runs
        # If nothing is tuned, every ε has the same rates, and one control serves all of them.
        controls = private if self.trials else int(len(self.budgets) == private)
        return runs + controls * len(self.rows) * self.seeds

    def candidates(self, row: str) -> list[Rates]:
        """Return the rates of a row that are known before any trial.

        These are its own, and then multiples of them within `RANGES`, unless Optuna chooses them.

        The multiples are points of a Halton sequence on a logarithmic scale. It is not scrambled,
        so it is the same in every version of SciPy. A longer list begins with the shorter one.
        """
        from scipy.stats import qmc  # type: ignore[import-untyped,unused-ignore]

        method = self._method(row)
        config = method.of(self.config)
        own = (config.lr_a, config.lr_b, config.lr_head)
        if self.sampler == OPTUNA:
            return [own]
        points = qmc.Halton(d=len(RANGES), scramble=False)
        points.fast_forward(1)  # Its first point is the corner of the smallest rates.
        spread = (_spread(point, own) for point in points.random(max(self.trials - 1, 0)))
        kept = [name in method.settings for name in RATES]
        fixed = [tuple(np.where(kept, own, rates).tolist()) for rates in spread]
        return list(dict.fromkeys([own, *fixed]))  # A row that sets every rate has one candidate.

    def kept(self, row: str) -> list[str]:
        """Return the rates that a row sets itself."""
        return [name for name in RATES if name in self._method(row).settings]

    def trials_of(self, row: str) -> int:
        """Return how many trials a row has at each ε; one if it sets every rate itself."""
        if self.sampler == OPTUNA and self.trials:
            return self.trials if len(self.kept(row)) < len(RATES) else 1
        return len(self.candidates(row)) if self.trials else 0

    def trial(self, pair: Pair, rates: Rates) -> Job:
        """Return the run that tries rates."""
        return self._job(TUNE, pair, TUNING_SEED, rates)

    def tune_jobs(self) -> list[Job]:
        """Return the trials that are known before any has run (see `trial_jobs`)."""
        if not self.trials:
            return []
        candidates = {method.name: self.candidates(method.name) for method in self.rows}
        return [self.trial(pair, rates) for pair in self.pairs for rates in candidates[pair[0]]]

    def choose(
        self, rows: Mapping[RowKey, Row], tried: Sequence[Job] | None = None
    ) -> dict[Pair, Rates | None]:
        """Return the rates with which each pair ended best, the first ones if several are equal.

        A pair has None if every trial failed.

        Parameters
        ----------
        rows : Mapping
            The finished runs by key.
        tried : Sequence[Job], optional
            The trials; by default those of `tune_jobs`.
        """
        if not self.trials:
            return self._own()
        chosen: dict[Pair, Rates | None] = dict.fromkeys(self.pairs)
        best: dict[Pair, float] = {}
        for job in self.tune_jobs() if tried is None else tried:
            row = rows[job.key]
            if not row["error"] and row["final"] > best.get(job.pair, -math.inf):
                best[job.pair], chosen[job.pair] = row["final"], job.rates
        return chosen

    def report_jobs(self, chosen: Mapping[Pair, Rates | None]) -> list[Job]:
        """Return the runs that are reported. A pair without rates has none."""
        return [
            self._job(REPORT, pair, seed, rates)
            for seed in range(1, self.seeds + 1)
            for pair, rates in chosen.items()
            if rates is not None
        ]

    def control(self, job: Job, chosen: Mapping[Pair, Rates | None]) -> Job:
        """Return the run of a reported job without noise, all else equal.

        It is a reported run itself where the row reports the same rates without privacy.

        Raises
        ------
        InvalidValue
            A setting needs a finite ε.
        """
        same = chosen.get((job.row, math.inf)) == job.rates
        return Job(REPORT if same else CONTROL, job.row, replace(job.config, epsilon=math.inf))

    def control_jobs(self, chosen: Mapping[Pair, Rates | None]) -> list[Job]:
        """Return the runs without noise that are not reported anyway, each once."""
        if NO_NOISE not in self.baselines:
            return []
        private = [job for job in self.report_jobs(chosen) if job.config.private]
        controls = {c.key: c for c in (self.control(job, chosen) for job in private)}
        return [job for job in controls.values() if job.phase == CONTROL]

    def check(self, console: Console | None = None) -> None:
        """Refuse settings that cannot run, before anything runs.

        Raises
        ------
        InvalidValue
            A setting cannot be used, or a client could not keep its promise.
        """
        from fedlora_flwr.privacy.budget import check_budget
        from fedlora_flwr.simulations.runner import prepare_run
        from fedlora_flwr.studies.metric import check_metric

        own = self._own()
        jobs = [*self.tune_jobs(), *self.report_jobs(own), *self.control_jobs(own)]
        batches = {(j.config.epsilon, j.config.batch_size, j.config.seed): j.config for j in jobs}
        for config in batches.values():
            task = build_task(config.task, config)
            for size in np.unique(client_sizes(config, task)).tolist():
                if config.private:
                    batch = 1 if config.secure_sum else config.batch_size
                    check_budget(config.epsilon, config.delta, batch, size, config.unit)
        # The runs use the cached calibrations of these checks.
        for config in {job.row: job.config for job in reversed(jobs)}.values():
            prepare_run(config, console)
        check_metric(self.config)

    def document(self) -> dict[str, Any]:
        """Return the settings for ``settings.json``. ε is text, because JSON has no infinity.

        Baselines and reference are not among them: they change no run that is there.
        """
        replaced = ("strategy", "epsilon", "seed")
        return {
            **{key: value for key, value in self.config.items().items() if key not in replaced},
            "rows": settings_of(self.methods),
            "epsilons": [str(epsilon) for epsilon in self.epsilons],
            "seeds": self.seeds,
            "trials": self.trials,
            **({"sampler": self.sampler} if self.sampler != HALTON else {}),
        }

    def _method(self, row: str) -> Method:
        return next(method for method in self.rows if method.name == row)

    def _own(self) -> dict[Pair, Rates | None]:
        """Return every pair with the rates of its row, without tuning."""
        return {pair: self.candidates(pair[0])[0] for pair in self.pairs}

    def _job(self, phase: str, pair: Pair, seed: int, rates: Rates) -> Job:
        row, epsilon = pair
        config = self._method(row).of(replace(self.config, epsilon=epsilon, seed=seed))
        a, b, head = rates
        return Job(phase, row, replace(config, lr_a=a, lr_b=b, lr_head=head))


def _spread(point: Sequence[float], own: Rates) -> Rates:
    """Place a point of the unit cube in `RANGES` around the own rates, to three digits."""
    places = zip(own, point, RANGES.values(), strict=True)
    a, b, head = (rounded(rate * low * (high / low) ** u) for rate, u, (low, high) in places)
    return a, b, head


def rounded(rate: float) -> float:
    """Return a rate with three digits, as tables show it."""
    return float(f"{rate:.3g}")
