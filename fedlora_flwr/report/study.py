"""A comparison of methods over privacy budgets, from its ``rows.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlora_flwr.report.charts import LOOKS, Chart, Line
from fedlora_flwr.report.comparison import interval
from fedlora_flwr.report.html import Markup, element, table
from fedlora_flwr.report.scales import percent, plain, size
from fedlora_flwr.report.sections import Section

Cells = dict[tuple[str, float], list[Mapping[str, Any]]]


def study_sections(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return the parts of a comparison's report.

    Parameters
    ----------
    rows : Sequence[Mapping[str, Any]]
        Its rows (see `fedlora_flwr.studies.compare_results.Row`). Those of tuning are left out,
        since their seed is not reported.
    """
    told = [row for row in rows if row["phase"] == "report"]
    # A run that failed and was tried again has two rows, of which the later one counts.
    last = {(row["row"], float(row["epsilon"]), row["seed"]): row for row in told}
    cells: Cells = {}
    for (name, epsilon, _), row in last.items():
        cells.setdefault((str(name), epsilon), []).append(row)
    failed = [row for row in last.values() if row["error"]]
    found = [Section("result", "Result", [*_chart(cells), _table(cells)])]
    if failed:
        found.append(Section("failures", "Failed runs", [_failures(failed)]))
    return found


def _finals(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(row["final"]) for row in rows if not row["error"]]


def _chart(cells: Cells) -> list[Markup]:
    """Return the chart of all methods over the budgets; runs without privacy have no ε."""
    lines = []
    for name in dict.fromkeys(name for name, _ in cells):
        there = sorted(
            (epsilon, finals)
            for (row, epsilon), rows in cells.items()
            if row == name and math.isfinite(epsilon) and (finals := _finals(rows))
        )
        band = [(epsilon, *ends) for epsilon, finals in there if (ends := interval(finals))]
        points = [(epsilon, fmean(finals)) for epsilon, finals in there]
        lines += [Line(name, points, band)] if points else []
    if not lines:
        return []
    title, y = "Metric after the last round, by budget", "metric"
    chart = Chart(title, "privacy budget ε", y, lines[:LOOKS], percent, whole=False)
    note = "Bands are 95% intervals of the mean over seeds, by Student's t."
    if len(lines) > LOOKS:
        note += f" The chart shows the first {LOOKS} methods, and the table all."
    return [element("p", note), element("div", chart.figure(), class_="charts")]


def _table(cells: Cells) -> Markup:
    body = []
    for (name, epsilon), rows in cells.items():
        finals = _finals(rows)
        ends = interval(finals)
        sent = [float(row["bytes_up"]) for row in rows if not row["error"]]
        body.append([
            name, plain(epsilon) if math.isfinite(epsilon) else "no privacy", str(len(finals)),
            percent(fmean(finals)) if finals else "–",
            f"{percent(ends[0])} to {percent(ends[1])}" if ends else "–",
            size(fmean(sent)) if sent else "–", str(len(rows) - len(finals)),
        ])  # fmt: skip
    head = ("method", "ε", "runs", "mean", "95% interval", "mean bytes up", "failed")
    return table("Metric after the last round, by method and budget", head, body)


def _failures(rows: Sequence[Mapping[str, Any]]) -> Markup:
    body = [
        [str(row["row"]), plain(float(row["epsilon"])), str(row["seed"]), str(row["error"])]
        for row in rows
    ]
    head = ("method", "ε", "seed", "reason")
    return table("Runs that failed; the same command tries them again", head, body, numbers=False)
