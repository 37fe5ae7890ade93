"""``python -m benchmarks.accuracy_tables --write``: the tables of accuracy in docs/results.md.

They are made from the rows in benchmarks/results/, so no figure in them is typed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from benchmarks.advice_rows import HEAD
from benchmarks.page_tables import replaced
from benchmarks.pictures import ROOT, runs_of
from fedlora_flwr.files import replace_file
from fedlora_flwr.places import STRATEGIES
from fedlora_flwr.studies.compare_methods import RATES

PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class AccuracyTable:
    """A table of the page.

    Parameters
    ----------
    place : str
        Name of its place in the page.
    files : tuple[str, ...]
        The rows, below ``benchmarks/results``.
    wide : bool (default: False)
        Whether it also tells the kB of a whole run and marks the best of each column.
    rates : bool (default: False)
        Whether it tells learning rates in place of accuracy.
    """

    place: str
    files: tuple[str, ...]
    wide: bool = False
    rates: bool = False


_DIGITS = ("digits/rows.csv", "digits/head-only.csv")
TABLES = (
    AccuracyTable("accuracy on digits", _DIGITS, wide=True),
    AccuracyTable("rates on digits", _DIGITS, rates=True),
    AccuracyTable("accuracy on CIFAR-10", ("cifar10-small-swin/rows.csv",)),
    AccuracyTable("accuracy on digits by trust model", ("secure-sum/rows.csv",)),
    AccuracyTable("accuracy on SST-2 by trust model", ("secure-sum/sst2.csv",)),
    AccuracyTable("accuracy on CIFAR-10 by trust model", ("secure-sum/cifar10.csv",)),
)


def lines_of(table: AccuracyTable) -> Iterator[list[str]]:
    """Yield the heads of a table, and then its lines: a row of the comparison each."""
    runs = runs_of(*table.files)
    places = {name: number for number, name in enumerate(STRATEGIES)}
    runs = runs.sort_values("row", key=lambda names: names.map(places), kind="stable")
    budgets = sorted(runs["epsilon"].unique())
    means = runs.groupby(["row", "epsilon"])["final"].mean().round(9)
    best = means.groupby("epsilon").max()
    heads = ["no privacy" if math.isinf(epsilon) else f"ε = {epsilon:g}" for epsilon in budgets]
    yield ["method", *heads, *(["kB up", "kB down"] if table.wide else [])]
    for row, found in runs.groupby("row", sort=False):
        cells = []
        for epsilon in budgets:
            some = found[found["epsilon"] == epsilon]
            text = _rates(some) if table.rates else _accuracy(some["final"])
            top = table.wide and len(some) and means[row, epsilon] == best[epsilon]
            cells.append(f"**{text}**" if top else text)
        if table.wide:
            cells += [f"{found[name].mean() / 1e3:,.1f}" for name in ("bytes_up", "bytes_down")]
        yield [str(row), *cells]


def _accuracy(finals: pd.Series[float]) -> str:
    """Return the mean over the seeds and its sample standard deviation, in %."""
    if finals.empty:
        return ""
    spread = f" ± {100 * finals.std():.1f}" if len(finals) > 1 else ""
    return f"{100 * finals.mean():.1f}{spread}"


def _rates(runs: pd.DataFrame) -> str:
    """Return the learning rates of A, B and head. The head alone has one."""
    if runs.empty:
        return ""
    values = [f"{runs[name].iloc[0]:g}" for name in RATES]
    return " / ".join(["–", "–", values[2]] if runs["row"].iloc[0] == HEAD else values)


def text_of(table: AccuracyTable) -> str:
    """Return a table in Markdown."""
    heads, *rest = lines_of(table)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rest))


def page_with(page: str) -> str:
    """Return the page with all tables as the rows make them."""
    for table in TABLES:
        page = replaced(page, table.place, text_of(table))
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them to the page if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write them to docs/results.md")
    write = parser.parse_args(arguments).write
    for table in TABLES:
        print(f"{table.place}\n{text_of(table)}\n")
    if write:
        replace_file(PAGE, page_with(PAGE.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
