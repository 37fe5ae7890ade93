"""Every figure of the README comes from a committed row; a figure without one fails here."""

from __future__ import annotations

import json
import math
import re
from statistics import fmean, stdev

import pytest

from benchmarks.advice_rows import HEAD, RESULTS, SOURCES, runs
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.forecast.advice import nearest, table
from fedlora_flwr.forecast.forecast import forecast
from tests.support.readme import README

MAKE_RUN = json.loads((RESULTS / "digits" / "make-run.json").read_text(encoding="utf-8"))
# These are versions and names, and not results.
OTHER = ("3.11", "2.0")


def ahead_of_the_head() -> str:
    """Return by how much the best row is ahead of the head alone at ε = 8 on digits."""
    cell = nearest("digits", "local", 8.0)
    assert cell is not None
    assert cell.adapters == "ahead"
    rows = {
        name: {run.seed: run.final for source in SOURCES for run in runs(source).get(8.0, ())
               if source.recipe == cell.recipe and run.row == name}
        for name in (cell.best, HEAD)
    }  # fmt: skip
    gaps = [100 * (rows[cell.best][seed] - rows[HEAD][seed]) for seed in range(1, 6)]
    assert fmean(gaps) == pytest.approx(100 * cell.gain, abs=0.01)
    return f"{fmean(gaps):.1f} ± {stdev(gaps) / math.sqrt(len(gaps)):.1f}"


def highest(trust: str) -> str:
    """Return the highest mean at ε = 1 on digits under a trust model."""
    cell = nearest("digits", trust, 1.0)
    assert cell is not None
    found = [
        [run.final for run in runs(source).get(1.0, ()) if run.row == cell.best]
        for source in SOURCES
        if (source.task, source.trust_model) == ("digits", trust)
    ]
    return f"{100 * max(fmean(each) for each in found if each):.1f}"


def make_run() -> set[str]:
    """Return the figures of `make run`: those that it measured, and those that follow."""
    accuracy = {f"{100 * MAKE_RUN[key]:.1f}" for key in ("initial_accuracy", "final_accuracy")}
    found = forecast(load_recipe("digits"))
    sigmas = [one.mechanism.noise_multiplier for one in found.clients if one.mechanism]
    messages = found.config.num_rounds * found.config.num_clients
    sent = {f"{messages * size / 1e6:.1f}" for size in (found.bytes_up, found.bytes_down)}
    noise = {f"{min(sigmas):.2f}", f"{max(sigmas):.2f}"}
    return {*accuracy, *noise, *sent, f"{MAKE_RUN['epsilon_max']:.3f}", f"{MAKE_RUN['delta']:g}"}


def test_each_figure_is_that_of_a_row() -> None:
    figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", re.sub(r"\]\([^)]*\)", "]", README))
    shown = {figure for figure in figures if figure not in OTHER}
    sums = {highest("secure-sum"), highest("local")}
    assert shown == {ahead_of_the_head(), *sums, *make_run()}


def test_what_the_readme_says_of_strategies_is_measured() -> None:
    """Its caption and its column "choose it when", for digits and SST-2."""
    for one in table():
        local, unsure = one.trust_model == "local", one.adapters in ("alike", "behind")
        if one.task == "digits" and local:
            assert unsure == (one.epsilon <= 3)
            assert one.row.partition(",")[0] == ("head-only" if unsure else "rolora")
        elif one.task == "digits":
            assert (
                one.row == {0.5: HEAD, 1.0: "as-lora", 3.0: "as-lora", 8.0: "rolora"}[one.epsilon]
            )
            assert (one.adapters == "ahead") == (one.epsilon >= 1)
        if one.epsilon >= 8 and one.task == "digits":
            assert not [name for name in one.behind if name != HEAD and (local or name == "rolora")]
        if one.task == "text-classification":
            assert one.best == "dp-lora"
