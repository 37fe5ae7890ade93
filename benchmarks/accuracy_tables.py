"""The tables of accuracy in docs/results.md, made from the rows in benchmarks/results/.

    python -m benchmarks.accuracy_tables --write

They are the tables that `fedlora compare` makes, so no figure in them is typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.advice import PAGE
from benchmarks.advice_rows import HEAD
from benchmarks.page_tables import asked_to_write, replaced
from benchmarks.pictures import runs_of
from fedlora_flwr.files import replace_file
from fedlora_flwr.studies.compare_results import Row, summarize
from fedlora_flwr.studies.compare_tables import Table, baseline_rows, figures_and_rates, markdown
from fedlora_flwr.studies.paired import Findings, figure


@dataclass(frozen=True)
class AccuracyTable:
    """A table of the page.

    Parameters
    ----------
    place : str
        Name of its place in the page.
    files : tuple[str, ...]
        The rows, below ``benchmarks/results``.
    sent : bool (default: False)
        Whether it also tells the kB of a whole run.
    rates : bool (default: False)
        Whether it tells learning rates in place of accuracy.
    """

    place: str
    files: tuple[str, ...]
    sent: bool = False
    rates: bool = False


_DIGITS = ("digits/rows.csv", "digits/head-only.csv")
TABLES = (
    AccuracyTable("accuracy on digits", _DIGITS, sent=True),
    AccuracyTable("rates on digits", _DIGITS, rates=True),
    AccuracyTable("accuracy on CIFAR-10", ("cifar10-small-swin/rows.csv",)),
    AccuracyTable("accuracy on CIFAR-10, Dirichlet 0.5", ("cifar10-small-swin/dirichlet-0.5.csv",)),
    AccuracyTable("accuracy on CIFAR-10, Dirichlet 0.1", ("cifar10-small-swin/dirichlet-0.1.csv",)),
    AccuracyTable("accuracy on SST-2 by method", ("sst2-minilm/all-methods.csv",), sent=True),
    AccuracyTable("right answers on the instruction task", ("skills/rows.csv",), sent=True),
    AccuracyTable("accuracy on digits under a secure sum", ("secure-sum/digits.csv",), sent=True),
    AccuracyTable("accuracy on SST-2 by trust model", ("secure-sum/sst2.csv",)),
    AccuracyTable(
        "accuracy on SST-2 by method under a secure sum",
        ("secure-sum/sst2-all-methods.csv",),
        sent=True,
    ),
    AccuracyTable("accuracy on CIFAR-10 by trust model", ("secure-sum/cifar10.csv",)),
    AccuracyTable(
        "accuracy on CIFAR-10, Dirichlet 0.5, under a secure sum",
        ("secure-sum/cifar10-dirichlet-0.5.csv",),
    ),
    AccuracyTable(
        "accuracy on CIFAR-10, Dirichlet 0.1, under a secure sum",
        ("secure-sum/cifar10-dirichlet-0.1.csv",),
    ),
    AccuracyTable("right answers under a secure sum", ("secure-sum/skills.csv",), sent=True),
)


def cells_of(table: AccuracyTable) -> Table:
    """Return the cells of a table, its head first."""
    found = runs_of(*table.files).sort_values("epsilon", kind="stable")
    runs = [cast(Row, run) for run in found.to_dict("records")]
    # Some files have other columns for rates.
    rates = {
        (run["row"], run["epsilon"]): (run["lr-a"], run["lr-b"], run["lr-head"])
        if table.rates
        else None
        for run in runs
    }
    figures, chosen = figures_and_rates(summarize(runs, rates, len({run["seed"] for run in runs})))
    if table.rates:
        return [_of_the_head(row) if row[0] == HEAD else row for row in chosen]
    starts = found.groupby(["epsilon", "seed"])["initial"].mean()
    begun = {
        epsilon: start
        for epsilon in found["epsilon"].unique()
        if (start := figure(starts[epsilon].to_dict()))
    }
    figures += baseline_rows(Findings(HEAD, start=begun), list(begun))
    return figures if table.sent else [row[:-2] for row in figures]


def _of_the_head(row: list[str]) -> list[str]:
    """Leave out the rates of what the head alone does not have."""
    return [row[0], *(f"– / – / {cell.rpartition(' / ')[2]}" for cell in row[1:])]


def page_with(page: str) -> str:
    """Return the page with all tables as the rows make them."""
    for table in TABLES:
        page = replaced(page, table.place, markdown([cells_of(table)]).strip())
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them to the page if asked to."""
    write = asked_to_write("benchmarks.accuracy_tables", __doc__, arguments)
    for table in TABLES:
        print(f"{table.place}\n\n{markdown([cells_of(table)])}")
    if write:
        replace_file(PAGE, page_with(PAGE.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
