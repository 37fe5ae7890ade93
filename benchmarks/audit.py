"""The table of audits: what attacks find of a claim of ε = 4.

Run ``python -m benchmarks.audit``, or ``make audit``. Each row is an attack of `fedlora audit` on
short runs in which every record takes part (q = 1). All bounds of the table hold together at 95 %
confidence. ``--quick`` is a form of a minute with two methods. A check that runs with every change
must not fail by chance, so its bounds hold at 99.999 % confidence, and its bar is lower.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.figures import write_content
from benchmarks.tiny_llm import make
from fedlora_flwr.audit.canaries import GRADIENT, LABEL, TOKENS
from fedlora_flwr.audit.game import short
from fedlora_flwr.audit.modes import BLACK_BOX, ONE_RUN, PAIRED, attack
from fedlora_flwr.audit.picture import plot_audit
from fedlora_flwr.audit.record import VIOLATED, AuditRecord
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.files import replace_file, write_json
from fedlora_flwr.processes.workers import executor

RESULTS = Path(__file__).parent / "results" / "audit"
METHODS = (
    "dp-lora", "ffa-lora", "rolora", "la-lora", "as-lora", "fedsvd", "flexlora", "flora",
    "fedex-lora", "fedsa-lora",
)  # fmt: skip
EPSILON, RECORDS, CONFIDENCE, QUICK = 4.0, 8, 0.95, 1 - 1e-5
# Small steps, so that a loss is nearly a linear function of what was learned.
SMALL = {"lr-a": 0.01, "lr-b": 0.01, "lr-head": 0.01, "num-clients": 2}
ONE_SUM = {"num-clients": 2, "num-rounds": 1, "strategy": "ffa-lora"}


@dataclass(frozen=True)
class Cell:
    """One attack.

    Parameters
    ----------
    recipe : str
        Recipe that is attacked.
    mode, kind : str
        Mode and canary.
    bar : float
        Least share of the claim that the attack has to find; in nats for the language model.
    runs, records : int
        Number of runs, and records of each client.
    changes : Mapping[str, Any]
        Values by key.
    """

    recipe: str
    mode: str
    kind: str
    bar: float
    runs: int
    records: int = RECORDS
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        """The settings of each run."""
        fixed = {"epsilon": EPSILON, "device": "cpu", **self.changes}
        return short(load_recipe(self.recipe), self.records, fixed)


def cells(language_model: Path) -> Iterator[Cell]:
    """Yield all attacks of the table."""
    for method in METHODS:
        yield Cell("digits", PAIRED, GRADIENT, 0.8, 800, changes={"strategy": method})
    yield Cell("digits-secure-sum", PAIRED, GRADIENT, 0.8, 3200, changes=ONE_SUM)
    for method in ("ffa-lora", "rolora", "as-lora"):
        changes = {"strategy": method, "num-clients": 10}
        yield Cell("digits", ONE_RUN, GRADIENT, 0.4, 1, 200, changes)
    yield Cell("digits", BLACK_BOX, LABEL, 0.25, 1200, changes=SMALL)
    changes = {**SMALL, "strategy": "ffa-lora", "partitioner": "iid", "partition-column": ""}
    changes |= {"min-records": 1, "lr-schedule": "constant", "optimizer": "sgd"}
    changes |= {"lr-a": 0.05, "lr-b": 0.05}
    yield Cell(str(language_model), BLACK_BOX, TOKENS, 0.25, 1000, changes=changes)


def quick() -> Iterator[Cell]:
    """Yield the attacks of the short form."""
    for method in ("ffa-lora", "rolora"):
        yield Cell("digits", PAIRED, GRADIENT, 0.2, 150, changes={"strategy": method})


def attacked(cell: Cell, confidence: float, workers: int, log: Path) -> AuditRecord:
    """Attack, and return the record."""
    about = (cell.config, cell.mode, cell.kind, cell.records, cell.runs, confidence)
    with executor(workers, log) as execute:
        return attack(*about, execute)


def row_of(cell: Cell, found: AuditRecord) -> dict[str, Any]:
    """Return a row of the table."""
    settings, counts = found.settings, found.counts
    return {
        "task": settings["task"], "strategy": settings["strategy"],
        "trust model": settings["trust-model"], "mode": found.mode, "canary": found.canary,
        "runs": counts.runs, "canaries": counts.absent + counts.present,
        "claim": round(found.claim, 3), "bound": round(found.best, 3),
        "bounds": {bound.statistic: round(bound.epsilon, 3) for bound in found.bounds},
        "ratio": round(found.ratio, 3), "bar": cell.bar, "met": found.ratio >= cell.bar,
        "verdict": found.verdict, "seconds": found.seconds,
    }  # fmt: skip


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    heads = ("task", "method", "trust model", "attack", "canaries", "runs", "ε ≥", "of the claim")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = (
            row["task"], row["strategy"], row["trust model"], f"{row['mode']}, {row['canary']}",
            f"{row['canaries']:,}", f"{row['runs']:,}", f"{row['bound']:.2f}",
            f"{row['ratio']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack all cells, show each row as it is ready, and write records, rows and table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two methods, fewer runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help=f"folder of the results ({RESULTS.name})")
    given = parser.parse_args(arguments)
    output: Path | None = given.output or (None if given.quick else RESULTS)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    say: Callable[[str], object] = Console().print
    with tempfile.TemporaryDirectory() as scratch:
        every = list(quick() if given.quick else cells(make(Path(scratch))))
        confidence = QUICK if given.quick else 1 - (1 - CONFIDENCE) / len(every)
        for cell in every:
            found = attacked(cell, confidence, given.workers, Path(scratch) / "log")
            rows.append(row_of(cell, found))
            say(f"{len(rows)} of {len(every)}: {rows[-1]}")
            if output and found.settings["strategy"] == "rolora" and cell.mode == PAIRED:
                write_json(output / "digits-rolora.json", found.as_json())
                plot_audit(found, output / "digits-rolora.png")
    if output:
        content = {"confidence": QUICK if given.quick else CONFIDENCE, "rows": rows}
        write_content(output / "table.json", "python -m benchmarks.audit", content)
        replace_file(output / "table.md", table_of(rows).encode())
    failed = [row for row in rows if row["verdict"] == VIOLATED]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
