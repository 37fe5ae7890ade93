"""Optuna chooses as many trials as any sampler has, and goes on from the rows of the folder."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.studies.compare import run_comparison
from fedlora_flwr.studies.compare_methods import read_methods
from fedlora_flwr.studies.compare_results import RowKey, read_rows
from fedlora_flwr.studies.comparing import compare
from fedlora_flwr.studies.comparison import RANGES, TUNING_SEED, Comparison, Job
from fedlora_flwr.studies.sampler_names import HALTON, OPTUNA
from fedlora_flwr.studies.trials import trial_jobs
from tests.server.resuming import tiny
from tests.studies.support import SHARED

METHODS = ("rolora", "ffa-lora lr-a=0.5 lr-b=0.25", "la-lora lr-a=0.5 lr-b=0.25 lr-head=0.1")
BEST = (0.1, 1.5, 0.2)


def comparison(**changes: Any) -> Comparison:
    methods = read_methods(changes.pop("methods", METHODS), RunConfig())
    made = Comparison(SHARED, methods, (3.0, 8.0), seeds=3, trials=8, sampler=OPTUNA)
    return replace(made, **changes)


def outcome(job: Job) -> dict[str, Any]:
    """Return a row whose figure is better the nearer the rates are to the best ones."""
    off = sum(math.log(rate / best) ** 2 for rate, best in zip(job.rates, BEST, strict=True))
    return {"error": "", "final": math.exp(-off)}


def played(what: Comparison, rows: dict[RowKey, Any], most: int = 10**6) -> list[Job]:
    """Do trials until so many rows are there, as a comparison that is killed then."""
    jobs: list[Job] = []
    for batch in trial_jobs(what, rows):
        for job in batch:
            if job.key not in rows:
                if len(rows) == most:
                    return jobs
                rows[job.key] = outcome(job)
            jobs.append(job)
    return jobs


def test_every_pair_has_the_stated_number_of_trials_on_a_seed_that_is_not_reported() -> None:
    what, rows = comparison(), dict[RowKey, Any]()
    jobs = played(what, rows)
    name, some, none = (method.name for method in what.rows)
    counted = {pair: sum(job.pair == pair for job in jobs) for pair in what.pairs}
    for epsilon in what.budgets:
        # A row that sets every rate itself has nothing to choose.
        assert [counted[row, epsilon] for row in (name, some, none)] == [8, 8, 1]
    assert len(rows) == len(jobs) == sum(counted.values())
    assert {job.config.seed for job in jobs} == {TUNING_SEED}
    chosen = what.choose(rows, jobs)
    assert TUNING_SEED not in {job.config.seed for job in what.report_jobs(chosen)}
    assert what.most_runs == len(jobs) + 3 * len(what.pairs)


def test_trials_begin_with_the_own_rates_stay_in_the_ranges_and_change_no_kept_rate() -> None:
    what, rows = comparison(), dict[RowKey, Any]()
    jobs = played(what, rows)
    for pair in what.pairs:
        own, *others = (job.rates for job in jobs if job.pair == pair)
        assert own == what.candidates(pair[0])[0]
        kept = what.kept(pair[0])
        for rates in others:
            for name, mine, rate in zip(RANGES, own, rates, strict=True):
                low, high = RANGES[name]
                # Rates are rounded to three digits.
                assert low * mine * 0.99 <= rate <= high * mine * 1.01
                assert rate == mine or name not in kept


def test_a_trial_follows_from_the_earlier_ones() -> None:
    what = comparison(methods=("rolora",), epsilons=(8.0,), trials=40)
    good, other = dict[RowKey, Any](), dict[RowKey, Any]()
    jobs = played(what, good)
    first, last = jobs[:8], jobs[-8:]

    def mean(some: list[Job]) -> float:
        return statistics.fmean(outcome(job)["final"] for job in some)

    assert mean(last) > 2 * mean(first)
    # The first rates are drawn at random. Later ones depend on the figures.
    for batch in trial_jobs(what, other):
        for job in batch:
            other[job.key] = {"error": "", "final": -outcome(job)["final"]}
    assert list(other)[:4] == list(good)[:4]
    assert list(other)[8:] != list(good)[8:]


@pytest.mark.parametrize("most", [0, 1, 5, 20])
def test_a_comparison_that_continues_has_the_trials_that_it_would_have_had(most: int) -> None:
    whole, broken = dict[RowKey, Any](), dict[RowKey, Any]()
    played(comparison(), whole)
    played(comparison(), broken, most)
    assert len(broken) == most
    played(comparison(), broken)
    assert broken == whole


def test_a_trial_that_failed_is_not_chosen_and_the_others_follow() -> None:
    what, rows = comparison(methods=("rolora",), epsilons=(8.0,)), dict[RowKey, Any]()
    jobs: list[Job] = []
    for number, (job,) in enumerate(trial_jobs(what, rows)):
        failed = {"error": "ModelFailed: no", "final": None}
        rows[job.key] = failed if number in (0, 5) else outcome(job)
        jobs.append(job)
    assert len(rows) == 8
    best = max(
        (job for job in jobs if not rows[job.key]["error"]), key=lambda j: outcome(j)["final"]
    )
    assert what.choose(rows, jobs) == {("rolora", 8.0): best.rates}


def test_a_trial_that_is_tried_again_hides_no_other_one() -> None:
    what, first = comparison(methods=("rolora",), epsilons=(8.0,)), dict[RowKey, Any]()
    jobs = played(what, first)
    for failed in (0, 3, 7):
        # A call that follows does not know the failed run any more, and begins with it again.
        rows = {key: row for key, row in first.items() if key != jobs[failed].key}
        assert {job.key for job in played(what, rows)} == rows.keys()
        assert len(rows) == 8


def test_another_sampler_is_another_comparison_and_an_unknown_one_is_refused(
    tmp_path: Path,
) -> None:
    assert comparison().document()["sampler"] == OPTUNA
    # A folder that is there goes on.
    assert "sampler" not in comparison(sampler=HALTON).document()
    with pytest.raises(InvalidValue, match=r"sampler = 'optunna'.*did you mean 'optuna'"):
        compare("digits", ["rolora"], sampler="optunna", output=tmp_path)


def test_a_real_comparison_is_stopped_and_continues_with_the_same_trials(tmp_path: Path) -> None:
    config = tiny(tmp_path, num_rounds=1)
    what = comparison(config=config, methods=("ffa-lora",), epsilons=(8.0,), trials=3, seeds=1)
    run_comparison(what, tmp_path / "whole", lambda *_: None)

    def stop(row: object, done: int, total: int) -> None:
        if row and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(what, tmp_path / "broken", stop)
    assert len(read_rows(tmp_path / "broken" / "rows.csv")) == 2
    told: list[tuple[int, int]] = []
    run_comparison(what, tmp_path / "broken", lambda row, *count: told.append(count))
    assert told[-1] == (4, 4)
    whole, broken = (read_rows(tmp_path / name / "rows.csv") for name in ("whole", "broken"))
    assert whole.drop(columns="seconds").equals(broken.drop(columns="seconds"))
    assert list(whole["phase"]) == ["tune"] * 3 + ["report"]
    assert "each chosen by Optuna's TPE" in (tmp_path / "broken" / "table.md").read_text()
