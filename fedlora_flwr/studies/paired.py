"""What the seeds of a comparison can tell: differences that are paired by seed, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from fedlora_flwr.report.comparison import interval
from fedlora_flwr.studies.baseline_names import NO_NOISE, NO_TRAINING
from fedlora_flwr.studies.compare_results import Pair, Rates, Row, RowKey
from fedlora_flwr.studies.comparison import Comparison

# Differences of figures that are equal but for rounding have a spread of about this size.
_ROUNDING = 1e-12
Finals = Mapping[int, float]
"""A figure by seed."""
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Figure:
    """The mean of a figure over seeds.

    Parameters
    ----------
    mean : float
        The mean.
    std : float
        Sample standard deviation; NaN for one seed.
    seeds : int
        How many seeds there are.
    """

    mean: float
    std: float
    seeds: int


@dataclass(frozen=True)
class Difference:
    """The mean of a difference that is taken seed by seed, with its confidence interval.

    Parameters
    ----------
    mean : float
        The mean.
    low, high : float
        Ends of the interval (see `interval`); NaN where the seeds give none.
    seeds : int
        Seeds that have both figures.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {**asdict(self), "told_apart": self.told_apart}


def figure(values: Finals) -> Figure | None:
    """Return mean and spread of a figure; None without a seed."""
    if not values:
        return None
    numbers = np.array(list(values.values()))
    std = float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
    return Figure(float(numbers.mean()), std, len(numbers))


def paired(one: Finals, other: Finals) -> Difference | None:
    """Return the mean of ``one - other`` over the seeds that both have.

    The interval is Student's, ``mean ± t(n - 1) s / √n`` with the sample standard deviation s of
    the n differences. It assumes that these are independent and about normal. There is no interval
    for one seed, or if all differences are the same number other than zero: a metric with few
    values can make them so by chance, and their spread then says nothing.

    Parameters
    ----------
    one, other : Mapping[int, float]
        The figure by seed.

    Returns
    -------
    Difference or None
        None if no seed has both figures.
    """
    both = sorted(one.keys() & other.keys())
    if not both:
        return None
    gaps = np.array([one[seed] - other[seed] for seed in both])
    mean, count = float(gaps.mean()), len(gaps)
    if np.ptp(gaps) > _ROUNDING and (ends := interval(gaps.tolist())):
        return Difference(mean, *ends, count)
    if count > 1 and abs(mean) <= _ROUNDING:
        return Difference(0.0, 0.0, 0.0, count)
    return Difference(mean, math.nan, math.nan, count)


@dataclass(frozen=True)
class Findings:
    """What the finished runs of a comparison say beside the figures of its rows.

    Parameters
    ----------
    reference : str
        The row from which differences are taken.
    against : dict[Pair, Difference]
        Row minus reference, at the same ε.
    start, start_against : dict[float, Figure], dict[float, Difference]
        By ε: the figure before training, and its difference to the reference.
    controls : dict[Pair, Figure]
        The figure of each private row and ε without noise, all else equal.
    controls_against : dict[Pair, Difference]
        The control minus the control of the reference.
    noise : dict[Pair, Difference]
        Row minus its own control: what the noise costs.
    """

    reference: str
    against: dict[Pair, Difference] = field(default_factory=dict)
    start: dict[float, Figure] = field(default_factory=dict)
    start_against: dict[float, Difference] = field(default_factory=dict)
    controls: dict[Pair, Figure] = field(default_factory=dict)
    controls_against: dict[Pair, Difference] = field(default_factory=dict)
    noise: dict[Pair, Difference] = field(default_factory=dict)

    @property
    def differences(self) -> list[Difference]:
        """Every difference with an interval."""
        tables = (self.against, self.start_against, self.controls_against, self.noise)
        found = [one for table in tables for one in table.values()]
        return [one for one in found if not math.isnan(one.low)]


def findings(
    comparison: Comparison, rows: Mapping[RowKey, Row], chosen: Mapping[Pair, Rates | None]
) -> Findings:
    """Work out what the finished runs say.

    Parameters
    ----------
    comparison : Comparison
        What was compared.
    rows : Mapping
        The finished runs, by `fedlora_flwr.studies.comparison.Job.key`.
    chosen : Mapping[Pair, Rates | None]
        The reported rates of each pair.

    Raises
    ------
    InvalidValue
        The reference is not a row.
    """
    jobs, name = comparison.report_jobs(chosen), comparison.compared_with
    finals = _by_pair((job.pair, rows[job.key]) for job in jobs)
    starts = _by_pair(((job.pair, rows[job.key]) for job in jobs), "initial")
    controls: dict[Pair, dict[int, float]] = {}
    if NO_NOISE in comparison.baselines:
        private = [job for job in jobs if job.config.private]
        controls = _by_pair((j.pair, rows[comparison.control(j, chosen).key]) for j in private)
    begun = _starts(comparison, starts) if NO_TRAINING in comparison.baselines else {}
    reference = {epsilon: finals.get((name, epsilon), {}) for epsilon in comparison.budgets}
    bare = {epsilon: controls.get((name, epsilon), {}) for epsilon in comparison.budgets}
    others = [pair for pair in comparison.pairs if pair[0] != name]
    return Findings(
        reference=name,
        against=_known({p: paired(finals.get(p, {}), reference[p[1]]) for p in others}),
        start=_known({epsilon: figure(values) for epsilon, values in begun.items()}),
        start_against=_known({e: paired(values, reference[e]) for e, values in begun.items()}),
        controls=_known({pair: figure(values) for pair, values in controls.items()}),
        controls_against=_known({p: paired(controls.get(p, {}), bare[p[1]]) for p in others}),
        noise=_known({p: paired(finals.get(p, {}), controls[p]) for p in controls}),
    )


def _starts(comparison: Comparison, starts: Mapping[Pair, Finals]) -> dict[float, dict[int, float]]:
    """Return the start's figure by ε and seed: the reference's, or that of the first other row."""
    names = [row.name for row in comparison.rows]
    order = [comparison.compared_with, *names]
    found: dict[float, dict[int, float]] = {}
    for epsilon in comparison.budgets:
        found[epsilon] = {}
        for name in reversed(order):
            found[epsilon].update(starts.get((name, epsilon), {}))
    return found


def _by_pair(
    runs: Iterable[tuple[Pair, Row]], column: Literal["initial", "final"] = "final"
) -> dict[Pair, dict[int, float]]:
    """Return a column of finished runs by pair and seed; failed runs are left out."""
    found: dict[Pair, dict[int, float]] = {}
    for pair, row in runs:
        if not row["error"] and not math.isnan(row[column]):
            found.setdefault(pair, {})[row["seed"]] = row[column]
    return found


def _known(values: Mapping[Key, Value | None]) -> dict[Key, Value]:
    return {key: value for key, value in values.items() if value is not None}
