"""What `benchmarks.mechanisms` has measured, as the tables of docs/mechanisms.md.

A library of that command, without one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pandas as pd

from benchmarks import ROOT
from benchmarks.page_tables import replaced

RESULTS = ROOT / "benchmarks" / "results" / "mechanisms"
PAGE = ROOT / "docs" / "mechanisms.md"
Found: TypeAlias = Mapping[str, pd.DataFrame]

_STARTS = {"start": "before training (B = 0)", "later": "after training"}
SHOWN_ROUNDS = (5, 20, 40, 80)


def read(folder: Path) -> dict[str, pd.DataFrame]:
    """Read the rows of all parts."""
    return {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}


def sections(found: Found) -> dict[str, str]:
    """Return each table of the page by its name."""
    return {
        name: table(found[part])
        for part, tables in TABLES.items()
        for name, table in tables.items()
    }


def written(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with these tables between its comments.

    Raises
    ------
    ValueError
        The page lacks a table's comment.
    """
    for name, text in tables.items():
        page = replaced(page, name, text)
    return page


def noise_table(rows: pd.DataFrame) -> str:
    """Return the noise in the product over one and two rounds, by formula and by sampling."""
    heads = ["method"]
    heads += [
        f"{start}, {r} round{'s' * (r > 1)}" for start in _order(rows["start"]) for r in (1, 2)
    ]
    lines = []
    for method, own in rows.groupby("method", sort=False):
        cells = [
            f"{one.formula:.3g} ({one.sampled:.3g} ± {one.error:.1g})"
            for one in own.itertuples(index=False)
        ]
        lines.append([str(method), *cells])
    return _markdown(heads, lines)


def coupling_table(rows: pd.DataFrame) -> str:
    """Return the coupling of joint steps, and what the second-order term predicts."""
    heads = ["state", "noise ÷ gradient", "η", "change of the loss, single steps", "joint step",
             "coupling", "second order", "η² g_B g_A in the product"]  # fmt: skip
    lines = [
        [
            _STARTS[str(one.state)], f"{one.noise:g}", f"{one.rate:g}", f"{one.single:+.4f}",
            f"{one.joint:+.4f}", f"{one.coupling:.1%}", f"{one.second_order:.1%}",
            f"{one.product:.1%}",
        ]
        for one in rows.itertuples(index=False)
    ]  # fmt: skip
    return _markdown(heads, lines)


def reconstruction_table(rows: pd.DataFrame) -> str:
    """Return the error of reconstruction by schedule and round, mean over the seeds."""
    shown = [number for number in SHOWN_ROUNDS if number <= rows["round"].max()]
    heads = ["schedule", "noise", *(f"round {number}" for number in shown),
             "lost by averaging, last round"]  # fmt: skip
    lines = []
    for (noise, schedule), own in rows.groupby(["noise", "schedule"], sort=False):
        by_round = own.groupby("round")
        lost = by_round["mean_error"].mean().iloc[-1]
        cells = [_spread(by_round["error"].get_group(number), "{:.3f}") for number in shown]
        lines.append([str(schedule), f"{noise:g}", *cells, f"{lost:.1%}"])
    return _markdown(heads, lines)


AVERAGED = ("dp-lora", "la-lora", "rolora", "as-lora, one choice for all", "as-lora",
            "as-lora, a choice per layer")  # fmt: skip


def averaging_table(rows: pd.DataFrame) -> str:
    """Return what averaging factors lost by round in the runs on digits, means over the seeds."""
    errors = {
        name: pd.DataFrame([[float(x) for x in text.split()] for text in own["mean_error"]]).mean()
        for name, own in rows.groupby("row", sort=False)
        if name in AVERAGED
    }
    shown = [number for number in (2, 4, 8, 12) if number <= len(next(iter(errors.values())))]
    lines = [
        [name, *(f"{errors[name][number - 1]:.1%}" for number in shown)]
        for name in AVERAGED
        if name in errors
    ]
    return _markdown(["method", *(f"round {number}" for number in shown)], lines)


def steps_table(rows: pd.DataFrame) -> str:
    """Return time, memory and upload of each method, and over DP-LoRA's."""
    base = rows.iloc[0]
    lines = [
        [
            str(one.method),
            f"{one.seconds / base['seconds']:.2f}",
            f"{one.peak_mb:.0f} MB ({one.peak_mb / base['peak_mb']:.2f})",
            f"{one.mean_peak_mb:.0f} MB ({one.mean_peak_mb / base['mean_peak_mb']:.2f})",
            f"{one.upload_kb:.0f} kB ({one.upload_kb / base['upload_kb']:.2f})",
        ]
        for one in rows.itertuples(index=False)
    ]
    heads = ["method", "time of a step", "peak memory of a round", "mean of its steps' peaks",
             "upload per round"]  # fmt: skip
    return _markdown(heads, lines)


def aggregation_table(rows: pd.DataFrame) -> str:
    """Return by how many times an SVD of the full matrix takes longer than each server step."""
    layers = _order(rows["layer"])
    lines = []
    for method, own in rows.groupby("method", sort=False):
        by_layer = own.set_index("layer")
        cells = [
            f"{by_layer['milliseconds'][layer]:.3g} ms ({by_layer['ratio'][layer]:,.0f} ×)"
            for layer in layers
        ]
        lines.append([str(method), *cells])
    ranks = rows.drop_duplicates("layer").set_index("layer")["rank"]
    return _markdown(["server step", *(f"{layer}, r = {ranks[layer]}" for layer in layers)], lines)


def sharpness_table(rows: pd.DataFrame) -> str:
    """Return the curvature of runs, mean ± sample standard deviation over the seeds."""
    curved = rows.dropna(subset=["top_weights"])
    points = {name: 100 * curved[name] for name in ("ascent_weights", "random_weights")}
    curved = curved.assign(**points)
    heads = ["method", "loss", "λ, weights", "trace, weights", "points lost up the gradient",
             "points lost at random", "λ, factors", "trace, factors"]  # fmt: skip
    columns = {
        "loss": "{:.2f}", "top_weights": "{:.0f}", "trace_weights": "{:.0f}",
        "ascent_weights": "{:.1f}", "random_weights": "{:.1f}",
        "top_factors": "{:.1f}", "trace_factors": "{:.0f}",
    }  # fmt: skip
    lines = [
        [str(name), *(_spread(own[column], form) for column, form in columns.items())]
        for name, own in curved.groupby("row", sort=False)
    ]
    return _markdown(heads, lines)


BEST = "rolora"
"""What the methods themselves are compared with: the best baseline of LA-LoRA's paper."""


def accuracy_table(rows: pd.DataFrame) -> str:
    """Return the accuracy of all runs, and differences by seed from a method without changes."""
    lines = []
    for name, own in rows.groupby("row", sort=False):
        method = str(name).partition(",")[0]
        against = BEST if method == name else method
        known = against != name and against in set(rows["row"])
        said = f"{difference(rows, str(name), against)} ({against})" if known else ""
        lines.append([str(name), _spread(own["accuracy"], "{:.1%}"),
                      _spread(own["loss"], "{:.3f}"), said])  # fmt: skip
    return _markdown(["run", "accuracy", "loss", "accuracy minus that of …, by seed"], lines)


PAIRS = (
    ("la-lora", "dp-lora"),
    ("la-lora", "rolora"),
    ("as-lora", "dp-lora"),
    ("as-lora", "rolora"),
    ("la-lora, binomial filter", "la-lora"),
)
"""The rows whose sharpness the papers' claims compare."""


def flatness_table(rows: pd.DataFrame) -> str:
    """Return differences in sharpness by seed, ± their standard errors."""
    columns = {"top_weights": "λ, weights", "trace_weights": "trace, weights",
               "top_factors": "λ, factors", "trace_factors": "trace, factors"}  # fmt: skip
    there = set(rows.dropna(subset=["top_weights"])["row"])
    lines = [
        [f"{one} minus {other}", *(difference(rows, one, other, column, 1) for column in columns)]
        for one, other in PAIRS
        if {one, other} <= there
    ]
    return _markdown(["difference", *columns.values()], lines)


def difference(
    rows: pd.DataFrame, name: str, against: str, column: str = "accuracy", scale: float = 100
) -> str:
    """Return the mean difference of two rows by seed, times a scale, ± its standard error."""
    table = rows.pivot_table(index="seed", columns="row", values=column)
    gaps = scale * (table[name] - table[against])
    return f"{gaps.mean():+.1f} ± {gaps.std() / math.sqrt(len(gaps)):.1f}"


def _spread(values: pd.Series[float], form: str) -> str:
    mean = form.format(values.mean())
    return mean if len(values) < 2 else f"{mean} ± {form.format(values.std())}"


def _order(values: Iterable[object]) -> list[str]:
    return [str(value) for value in dict.fromkeys(values)]


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: Mapping[str, Mapping[str, Callable[[pd.DataFrame], str]]] = {
    "noise": {"noise": noise_table},
    "coupling": {"coupling": coupling_table},
    "reconstruction": {"reconstruction": reconstruction_table},
    "steps": {"steps": steps_table},
    "aggregation": {"aggregation": aggregation_table},
    "runs": {
        "averaging": averaging_table,
        "sharpness": sharpness_table,
        "flatness": flatness_table,
        "accuracy": accuracy_table,
    },
}
"""The tables of each part, by their names on the page."""
