"""The reported runs from which `benchmarks.advice` takes what to advise.

A library of that command, without one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import pandas as pd

from benchmarks import ROOT
from benchmarks.learning import NUMBERS
from fedlora_flwr.config.trust import LOCAL, SECURE_SUM
from fedlora_flwr.places import STRATEGIES
from fedlora_flwr.studies.compare_methods import RATES
from fedlora_flwr.studies.compare_results import REPORT, read_rows

RESULTS = ROOT / "benchmarks" / "results"
HEAD = "head-only"
LEFT_OUT = ("fedsa-lora",)  # Clients' own models answer another question.


@dataclass(frozen=True)
class Run:
    """One reported run.

    Parameters
    ----------
    row : str
        Its row of the table: the strategy, and what is special about it.
    settings : Mapping[str, float | str]
        Keys that are worth a choice: strategy, weights and rates.
    seed : int
        Its seed.
    final : float
        Accuracy after the last round, from 0 to 1.
    uploaded : float
        Bytes that all clients sent in the run.
    """

    row: str
    settings: Mapping[str, float | str]
    seed: int
    final: float
    uploaded: float


@dataclass(frozen=True)
class Source:
    """A file of rows, and where the documentation shows them.

    Parameters
    ----------
    task, trust_model, recipe : str
        What was run.
    file : str
        The rows, below ``benchmarks/results``.
    section : str
        Anchor of the section of docs/results.md.
    names : Mapping[str, tuple[str, str]]
        Strategy and remark by the name in the column ``column``. By default the name is the
        strategy.
    column : str
        Column of the name.
    epsilons : tuple[float, ...]
        The budgets of these rows that count; all, if empty.
    """

    task: str
    trust_model: str
    recipe: str
    file: str
    section: str
    names: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)
    column: str = "strategy"
    epsilons: tuple[float, ...] = ()


_DIGITS = ("digits", LOCAL, "digits")
_CIFAR, _SST2 = "image-classification", "text-classification"
SOURCES = (
    Source(*_DIGITS, "digits/rows.csv", "ten-methods-on-the-digits-recipe"),
    Source(*_DIGITS, "digits/options.csv", "options"),
    Source(*_DIGITS, "digits/head-only.csv", "ten-methods-on-the-digits-recipe", column="row",
           names={HEAD: (HEAD, ""), "head-only, weighting size": (HEAD, "weighting=size")}),
    Source(*_DIGITS, "digits/first-rates.csv", "options", column="row",
           names={name: (name, "rates around 0.5") for name in STRATEGIES}),
    # A sum has one step per round, with which LA-LoRA is RoLoRA.
    Source("digits", SECURE_SUM, "digits-secure-sum", "secure-sum/digits.csv",
           "noise-shared-over-a-secure-sum",
           names={name: (name, "") for name in ("dp-lora", "ffa-lora", "rolora", "as-lora", HEAD)}),
    # The comparison in cifar10-small-swin/rows.csv is of another pretraining, without the head.
    Source(_CIFAR, LOCAL, "cifar10-small-swin", "secure-sum/cifar10.csv",
           "cifar-10-under-a-secure-sum", column="row",
           names={"local, rolora": ("rolora", ""), "local, head-only": (HEAD, "")}),
    Source(_CIFAR, SECURE_SUM, "cifar10-swin-secure-sum", "secure-sum/cifar10.csv",
           "cifar-10-under-a-secure-sum", column="row",
           names={"secure sum, rolora": ("rolora", ""), "secure sum, head-only": (HEAD, "")}),
    # These rows have one seed, and another split than the rows with noise below. AS-LoRA was
    # measured with scores that it no longer has.
    Source(_SST2, LOCAL, "sst2-minilm", "sst2-minilm/rows.csv", "sst-2-on-minilm",
           names={name: (name, "") for name in ("dp-lora", "ffa-lora", "rolora", "la-lora")},
           epsilons=(math.inf,)),
    Source(_SST2, LOCAL, "sst2-minilm", "secure-sum/sst2.csv", "sst-2-under-a-secure-sum",
           column="row", names={"local, dp-lora": ("dp-lora", ""), "local, head-only": (HEAD, "")}),
    Source(_SST2, SECURE_SUM, "sst2-minilm-secure-sum", "secure-sum/sst2.csv",
           "sst-2-under-a-secure-sum", column="row",
           names={"secure sum, dp-lora": ("dp-lora", ""), "secure sum, head-only": (HEAD, "")}),
)  # fmt: skip
"""All rows that count. Rows of one cell share data, clients, rounds and backbone."""

# The rates that matter, where some part does not train.
_RATES = {HEAD: ("lr-head",), "ffa-lora": ("lr-b", "lr-head"), "fedsvd": ("lr-b", "lr-head")}
# The rows of SST-2 under a secure sum do not tell bytes. Each of six clients sends what trains.
_SST2_CLIENTS = 6


@cache
def runs(source: Source) -> Mapping[float, tuple[Run, ...]]:
    """Return the finished runs of a source by ε; infinity means no privacy."""
    rows = read_rows(RESULTS / source.file)
    if "phase" in rows:
        rows = rows[(rows["phase"] == REPORT) & (rows["error"] == "")]
    found: dict[float, list[Run]] = {}
    for record in rows.to_dict("records"):
        if made := _run(source, record):
            found.setdefault(float(record["epsilon"]), []).append(made)
    return {
        epsilon: tuple(each)
        for epsilon, each in found.items()
        if not source.epsilons or epsilon in source.epsilons
    }


def _run(source: Source, record: Mapping[object, object]) -> Run | None:
    """Return a row as a run; None if it does not count."""
    name = str(record[source.column])
    if source.names and name not in source.names:
        return None
    strategy, remark = source.names.get(name, (name, ""))
    option = record.get("option", "")
    remark = remark or ("" if pd.isna(option) else str(option))  # type: ignore[call-overload]
    if strategy in LEFT_OUT:
        return None
    key, _, value = remark.partition("=")
    options: dict[str, float | str] = {key: value} if value else {}
    return Run(
        row=f"{strategy}, {remark}" if remark else strategy,
        settings={"strategy": strategy, **options, **_rates(strategy, record)},
        seed=int(str(record["seed"])),
        final=float(str(record["final"])),
        uploaded=_uploaded(strategy, record),
    )


def _rates(strategy: str, record: Mapping[object, object]) -> dict[str, float | str]:
    # One column stands for three equal rates.
    each = {name: float(str(record.get(name, record.get("rates")))) for name in RATES}
    return {name: each[name] for name in _RATES.get(strategy, RATES)}


def _uploaded(strategy: str, record: Mapping[object, object]) -> float:
    if "bytes_up" in record:
        return float(str(record["bytes_up"]))
    of_b, of_a, of_head = NUMBERS["sst2-minilm"]
    numbers = of_head if strategy == HEAD else of_b + of_a + of_head
    return 4.0 * numbers * int(str(record["rounds"])) * _SST2_CLIENTS
