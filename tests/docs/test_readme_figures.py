"""Every figure of the README comes from a committed row; a figure without one fails here."""

from __future__ import annotations

import json
import math
import re

from benchmarks.advice_rows import RESULTS
from benchmarks.pictures import runs_of
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.forecast.advice import table
from fedlora_flwr.forecast.forecast import forecast
from tests.support.readme import README

MAKE_RUN = json.loads((RESULTS / "digits" / "make-run.json").read_text(encoding="utf-8"))
TURNS = ("ffa-lora", "rolora", "la-lora", "as-lora", "fedsvd")
BOTH = ("dp-lora", "flexlora", "flora", "fedex-lora")
# Versions and names, which are no results.
OTHER = ("3.11", "2.0")


def one_factor_ahead() -> str:
    """Return by how much methods that train one factor at a time are ahead at ε = 1."""
    runs = runs_of("digits").query("epsilon == 1")
    found = runs.pivot(index="seed", columns="row", values="final")
    gaps = 100 * (found[[*TURNS]].mean(axis=1) - found[[*BOTH]].mean(axis=1))
    assert (gaps > 0).all()
    return f"{gaps.mean():.1f} ± {gaps.std() / math.sqrt(len(gaps)):.1f}"


def mean_of(name: str) -> str:
    runs = runs_of("secure-sum").query("epsilon == 1 and row == @name")
    assert len(runs) == 3
    return f"{100 * runs['final'].mean():.1f}"


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
    sums = {mean_of("secure sum, ffa-lora"), mean_of("local, ffa-lora")}
    assert shown == {one_factor_ahead(), *sums, *make_run()}


def test_what_the_table_of_strategies_says_of_accuracy_is_measured() -> None:
    digits = [one for one in table() if one.task == "digits"]
    shared = [one for one in table() if one.task != "text-classification" and one.epsilon >= 3]
    for one in shared:
        if one.trust_model == "local":
            assert "rolora" in (one.best, *one.alike)
    for one in digits:
        if one.epsilon == 1:
            assert one.best.startswith("ffa-lora")
    for one in table():
        if one.task == "text-classification":
            assert one.best == "dp-lora"
