"""The report of a comparison: tables for a screen and ``table.md``, and the same in JSON types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from fedlora_flwr.config import RunConfig
from fedlora_flwr.report.comparison import LEVEL
from fedlora_flwr.studies.compare_methods import RATES, Method, settings_of
from fedlora_flwr.studies.compare_results import Pair, budget_name, data_name
from fedlora_flwr.studies.paired import Difference, Figure, Findings
from fedlora_flwr.studies.sampler_names import HALTON, OPTUNA

Table = list[list[str]]
"""The cells of a table, with its head as the first row."""
Part = str | Table
"""A sentence, or a table."""


def document_of(
    summary: pd.DataFrame,
    config: RunConfig,
    metric: str,
    trials: int,
    found: Findings,
    sampler: str = HALTON,
) -> list[Part]:
    """Return the report of a comparison: a title, tables and their explanations.

    Parameters
    ----------
    summary : pandas.DataFrame
        See `summarize`.
    config : RunConfig
        The configuration that all runs share.
    metric : str
        Name of the figure.
    trials : int
        How many settings of the rates were tried for each pair.
    found : Findings
        What the runs say beside the summary.
    sampler : str (default: "halton")
        What chose the settings that were tried.
    """
    budgets = _budgets(summary)
    figures, rates = figures_and_rates(summary)
    figures += baseline_rows(found, budgets)
    return [
        f"# {data_name(config)}: {metric} in % after round {config.num_rounds}",
        figures,
        "Mean ± sample standard deviation over the seeds, final round; bold: best of its "
        "column. Bytes: mean of a whole run, all clients together."
        + _own_note(summary)
        + _controls_note(found),
        *_against(found, rates[0], budgets),
        *_cost_of_noise(found, budgets),
        f"Learning rates ({' / '.join(RATES)})",
        rates,
        _rates_note(trials, sampler),
    ]


def figures_and_rates(summary: pd.DataFrame) -> tuple[Table, Table]:
    """Return the table of figures and bytes, and that of learning rates.

    Parameters
    ----------
    summary : pandas.DataFrame
        See `summarize`. The cell of a pair that it does not have is empty.
    """
    budgets = _budgets(summary)
    best = summary[summary["failed"] == 0].groupby("epsilon")["mean"].max()
    head = ["method", *map(_budget, budgets)]
    figures, rates = [[*head, "kB up", "kB down"]], [head]
    for name, group in summary.groupby("row", sort=False):
        rows = {row["epsilon"]: row for row in group.to_dict("records")}
        sent = [group[column].mean() / 1e3 for column in ("bytes_up", "bytes_down")]
        cells = [_figure(rows[e], best.get(e)) if e in rows else "" for e in budgets]
        kilobytes = ["–" if math.isnan(count) else f"{count:,.1f}" for count in sent]
        figures.append([str(name), *cells, *kilobytes])
        if group["own_mean"].notna().any():
            own = [_own(rows[e]) if e in rows else "" for e in budgets]
            figures.append([f"{name}, own labels", *own, "–", "–"])
        rates.append([str(name), *(_rates(rows[e]) if e in rows else "" for e in budgets)])
    return figures, rates


def _budgets(summary: pd.DataFrame) -> list[float]:
    return list(dict.fromkeys(summary["epsilon"]))


def markdown(parts: Sequence[Part]) -> str:
    """Return ``table.md``."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else _table(part)
        lines.append("")
    return "\n".join(lines)


def as_json(
    summary: pd.DataFrame, methods: Sequence[Method], metric: str, found: Findings
) -> dict[str, Any]:
    """Return a comparison in JSON types: an entry per row and ε."""
    known = settings_of(methods)
    rows = [
        {
            "row": row["row"],
            **{"strategy": known[row["row"]]["strategy"]},
            "settings": {k: v for k, v in known[row["row"]].items() if k != "strategy"},
            "epsilon": row["epsilon"],
            "rates": {name: row[name] for name in RATES},
            **{name: row[name] for name in ("mean", "std", "failed", "bytes_up", "bytes_down")},
            "own_labels": None if math.isnan(row["own_mean"]) else row["own_mean"],
            **_told(found, (row["row"], row["epsilon"])),
        }
        for row in summary.to_dict("records")
    ]
    start = [
        {
            "epsilon": epsilon,
            **asdict(value),
            "difference": _in_json(found.start_against.get(epsilon)),
        }
        for epsilon, value in found.start.items()
    ]
    named = {"reference": found.reference, "confidence": LEVEL}
    return {"metric": metric, **named, "rows": rows, "no_training": start}


def _told(found: Findings, pair: Pair) -> dict[str, Any]:
    """Return a pair's differences in JSON types; None where there are none."""
    control = found.controls.get(pair)
    return {
        "difference": _in_json(found.against.get(pair)),
        "control": asdict(control) if control else None,
        "control_difference": _in_json(found.controls_against.get(pair)),
        "cost_of_noise": _in_json(found.noise.get(pair)),
    }


def _in_json(value: Difference | None) -> dict[str, Any] | None:
    return value.as_json() if value else None


def baseline_rows(found: Findings, budgets: Sequence[float]) -> Table:
    """Return the rows of the baselines for the table of figures.

    Parameters
    ----------
    found : Findings
        What the runs say of the start, and of rows without noise.
    budgets : Sequence[float]
        The ε of each column.
    """
    rows = []
    if found.start:
        cells = [_mean(found.start.get(epsilon)) for epsilon in budgets]
        rows.append(["no training", *cells, "–", "–"])
    for name in dict.fromkeys(row for row, _ in found.controls):
        cells = [_mean(found.controls.get((name, epsilon))) for epsilon in budgets]
        rows.append([f"{name}, no noise", *cells, "–", "–"])
    return rows


def _own(row: Mapping[Any, Any]) -> str:
    return "–" if math.isnan(row["own_mean"]) else _spread(row["own_mean"], row["own_std"])


def _own_note(summary: pd.DataFrame) -> str:
    if not summary["own_mean"].notna().any():
        return ""
    return (
        " Clients of such a method have models of their own. The first of its two rows says how "
        "they do on everybody's classes, and the second weights the classes of the public records "
        "as each client's records do."
    )


def _controls_note(found: Findings) -> str:
    if not found.controls:
        return ""
    return (
        " No noise: the same rates, clip norm and batches as the row has at that ε, with σ = 0, "
        "for the same seeds."
    )


def _against(found: Findings, head: list[str], budgets: Sequence[float]) -> list[Part]:
    """Return the table of differences from the reference."""
    rows = [
        [name, *(_gap(found.against.get((name, epsilon))) for epsilon in budgets)]
        for name in dict.fromkeys(row for row, _ in found.against)
    ]
    if found.start_against:
        rows.append(["no training", *(_gap(found.start_against.get(e)) for e in budgets)])
    rows += [
        [f"{name}, no noise", *(_gap(found.controls_against.get((name, e))) for e in budgets)]
        for name in dict.fromkeys(row for row, _ in found.controls_against)
    ]
    if not rows:
        return []
    bare = ", no noise" if found.controls_against else ""
    text = f"Difference from {found.reference} in points, paired by seed"
    if bare:
        text += f"; rows without noise are compared with {found.reference}{bare}"
    return [text, [head, *rows], _intervals_note(found)]


def _cost_of_noise(found: Findings, budgets: Sequence[float]) -> list[Part]:
    """Return the table of what the noise costs each row."""
    private = [epsilon for epsilon in budgets if math.isfinite(epsilon)]
    rows = [
        [name, *(_gap(found.noise.get((name, epsilon))) for epsilon in private)]
        for name in dict.fromkeys(row for row, _ in found.noise)
    ]
    head = ["method", *(_budget(epsilon) for epsilon in private)]
    text = "With noise minus without, in points, paired by seed"
    return [text, [head, *rows]] if rows else []


def _intervals_note(found: Findings) -> str:
    count = len(found.differences)
    text = (
        f"Mean of the differences by seed, with its {LEVEL:.0%} interval by Student's t. ≈: the "
        "seeds do not tell the two apart, because the interval holds zero or one seed gives none. "
        "A seed changes partition, adapters, batches and noise, but not the test records."
    )
    if chance := round(count * (1 - LEVEL)):
        text += (
            f" Each interval stands alone: of {count}, about {chance} would leave zero out by "
            "chance."
        )
    return text


def _gap(value: Difference | None) -> str:
    """Write a difference in points; ≈ marks one that the seeds cannot tell from zero."""
    if value is None:
        return "–"
    mean, low, high = (f"{100 * part:+.1f}" for part in (value.mean, value.low, value.high))
    text = mean if math.isnan(value.low) else f"{mean} [{low}, {high}]"
    return text if value.told_apart else f"≈ {text}"


def _mean(value: Figure | None) -> str:
    if value is None:
        return "–"
    return _spread(value.mean, value.std)


def _spread(mean: float, std: float) -> str:
    """Write a mean, with its standard deviation if there is one, in percent."""
    text = f"{mean:.1%}".rstrip("%")
    return text if math.isnan(std) else f"{text} ± {std:.1%}".rstrip("%")


def _budget(epsilon: float) -> str:
    return f"ε = {budget_name(epsilon)}" if math.isfinite(epsilon) else "no privacy"


def _figure(row: Mapping[Any, Any], best: float | None) -> str:
    if math.isnan(row["mean"]):
        return "failed"
    text = _spread(row["mean"], row["std"])
    if row["failed"]:
        return f"{text} ({row['failed']} failed)"
    return f"**{text}**" if row["mean"] == best else text


def _rates(row: Mapping[Any, Any]) -> str:
    values = [row[name] for name in RATES]
    return "–" if any(map(math.isnan, values)) else " / ".join(f"{value:g}" for value in values)


def _rates_note(trials: int, sampler: str) -> str:
    if trials == 0:
        return "The configuration's own, without tuning."
    which = (
        "each chosen by Optuna's TPE from the earlier trials of the same method and ε"
        if sampler == OPTUNA
        else "the same for every method and ε but for rates that a row sets itself"
    )
    return (
        f"The best of {trials} settings, {which}, by the final round on the public test set with "
        "a seed that is not reported: somewhat optimistic."
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns also align as plain text."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
