"""Several runs compared: settings, their seeds, and 95% intervals of the mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedlora_flwr.report.charts import LOOKS, Chart, Line
from fedlora_flwr.report.facts import RunFacts, number
from fedlora_flwr.report.html import Markup, element, table
from fedlora_flwr.report.outcome import outcome
from fedlora_flwr.report.scales import BESIDE, Format, heading, in_words, percent, plain, size
from fedlora_flwr.report.sections import Section, shown_value

_NOT_A_SETTING = {
    "seed", "run-dir", "state-dir", "resume", "device", "client-threads", "share-weights",
}  # fmt: skip
"""Keys that do not change what is learned; a seed is what the interval is over."""
LEVEL = 0.95
"""Confidence of each interval, one at a time."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone.

    Parameters
    ----------
    name : str
        What sets it apart from the others.
    runs : Sequence[RunFacts]
        The runs.
    """

    name: str
    runs: Sequence[RunFacts]

    def line(self, figure: str) -> Line:
        """Return the mean by round over the runs that have it, and its interval."""
        found: dict[float, list[float]] = {}
        for run in self.runs:
            for x, y in run.points(figure):
                found.setdefault(x, []).append(y)
        points = [(x, fmean(ys)) for x, ys in sorted(found.items())]
        band = [(x, *ends) for x, ys in sorted(found.items()) if (ends := interval(ys))]
        return Line(self.name, points, band)

    def finals(self) -> list[float]:
        """Return the metric after the last round of each run that has ended as planned."""
        ended = (run for run in self.runs if run.status == "completed")
        values = (number(run.summary.get(f"final_{run.metric}")) for run in ended)
        return [value for value in values if value is not None]


def settings_of(runs: Sequence[RunFacts]) -> list[Setting]:
    """Group runs by their configuration without the seed; a name tells the keys that differ."""
    keys = [
        {k: v for k, v in run.config.items().items() if k not in _NOT_A_SETTING} for run in runs
    ]
    every = dict.fromkeys(key for one in keys for key in one)
    differing = [key for key in every if len({repr(one.get(key)) for one in keys}) > 1]
    groups: dict[str, list[RunFacts]] = {}
    for run, one in zip(runs, keys, strict=True):
        groups.setdefault(_name(one, differing) or run.config.strategy, []).append(run)
    return [Setting(name, found) for name, found in groups.items()]


def _name(values: dict[str, Any], differing: list[str]) -> str:
    parts = [str(values["strategy"])] if "strategy" in differing else []
    parts += [
        f"{key} = {shown_value(values.get(key, 'not set'))}"
        for key in differing
        if key != "strategy"
    ]
    return ", ".join(parts)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of the mean by Student's t; None for a single value.

    Raises
    ------
    NotInstalled
        SciPy is not installed.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    count = len(values)
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * stdev(values) / math.sqrt(count)
    return fmean(values) - half, fmean(values) + half


def comparison_sections(runs: Sequence[RunFacts]) -> list[Section]:
    """Return the parts of a report on several runs."""
    settings = settings_of(runs)
    return [
        Section("result", "Result", [_result(settings), *_charts(settings, runs)]),
        Section("runs", "Runs", [_runs(runs)]),
    ]


def _result(settings: Sequence[Setting]) -> Markup:
    rows = []
    for one in settings:
        finals, ends = one.finals(), interval(one.finals())
        spent = [number(run.summary.get("epsilon_max")) for run in one.runs]
        sent = [number(run.summary.get("bytes_up")) for run in one.runs]
        rows.append([
            one.name, str(len(one.runs)), percent(fmean(finals)) if finals else "–",
            f"{percent(ends[0])} to {percent(ends[1])}" if ends else "–",
            plain(max(found)) if (found := [x for x in spent if x is not None]) else "–",
            size(fmean(up)) if (up := [x for x in sent if x is not None]) else "–",
            str(len(one.runs) - len(finals)),
        ])  # fmt: skip
    caption = f"{heading(settings[0].runs[0].metric)} after the last round, by setting"
    head = ("setting", "runs", "mean", "95% interval", "largest ε", "mean bytes up", "unfinished")
    return table(caption, head, rows)


def _charts(settings: Sequence[Setting], runs: Sequence[RunFacts]) -> list[Markup]:
    metric, figures, shown = runs[0].metric, [], settings[:LOOKS]
    kinds: dict[str, Format] = {metric: percent, "loss": plain, "epsilon_max": plain}
    kinds |= dict.fromkeys(BESIDE, percent)
    names = {"epsilon_max": "largest ε spent"}
    for figure, form in kinds.items():
        lines = [line for one in shown if (line := one.line(figure)).points]
        if lines:
            words = names.get(figure, in_words(figure))
            figures.append(Chart(heading(words), "round", words, lines, form).figure())
    notes = ["Bands are 95% intervals of the mean over seeds, by Student's t."]
    if len({run.metric for run in runs}) > 1:
        notes.append(f"Only runs that measure {metric} are in its chart.")
    if len(settings) > LOOKS:
        notes.append(f"Charts show the first {LOOKS} settings.")
    return [element("p", " ".join(notes)), element("div", figures, class_="charts")]


def _runs(runs: Sequence[RunFacts]) -> Markup:
    rows = []
    for run in runs:
        first, last = outcome(run)
        spent = number(run.summary.get("epsilon_max"))
        failed = sum(len(row.get("failures") or ()) for row in run.rounds)
        rows.append([
            run.name, run.title, run.status, f"{first} → {last}",
            "–" if spent is None else plain(spent), str(failed),
        ])  # fmt: skip
    head = ("run", "what", "status", "metric", "largest ε", "failed replies")
    return table("Runs of this report", head, rows, numbers=False)
