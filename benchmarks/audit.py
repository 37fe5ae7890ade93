"""The table of audits: what attacks find of a claim of ε = 4.

Run ``python -m benchmarks.audit``, or ``make audit``. Each row is an attack of `fedlora audit` on
short runs in which every record takes part (q = 1). All bounds of the table hold together at 95 %
confidence. ``--only one-run rolora as-lora`` measures one run of these two methods again, and keeps
the other rows.
``--quick`` is a form of one or two minutes with two methods. A check that runs with every change
must not fail by chance, so its bounds hold at 99.999 % confidence, and its bar is lower.
"""

from __future__ import annotations

import argparse
import json
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
from fedlora_flwr.config.trust import LOCAL, SECURE_SUM
from fedlora_flwr.files import replace_file, write_json
from fedlora_flwr.processes.workers import executor

RESULTS = Path(__file__).parent / "results" / "audit"
METHODS = (
    "dp-lora", "ffa-lora", "rolora", "la-lora", "as-lora", "fedsvd", "flexlora", "flora",
    "fedex-lora", "fedsa-lora",
)  # fmt: skip
EPSILON, RECORDS, CONFIDENCE, QUICK = 4.0, 8, 0.95, 1 - 1e-5
# By calculation, an attack on a Gaussian mechanism of exactly this ε finds .89 ± .04 of it with so
# many canaries, and all ten methods are above .8 with a probability of .97 (with 3,200: .19).
CANARIES, CLIENTS = 6400, 4
# By simulation, an attack finds .50 ± .03 of it with 12,000 canaries, and less than .4 in none of
# 150 runs. Many clients are faster than many canaries of one client, which hide each other.
ONE_RUN_RECORDS, ONE_RUN_CLIENTS = 200, 60
# Small steps, so that a loss is nearly a linear function of what was learned.
SMALL = {"lr-a": 0.01, "lr-b": 0.01, "lr-head": 0.01, "num-clients": 2}
ONE_SUM = {"num-clients": 2, "num-rounds": 1, "strategy": "ffa-lora"}
TRUST_MODELS = (LOCAL, SECURE_SUM)
MODES = {"paired": PAIRED, "one-run": ONE_RUN, "black-box": BLACK_BOX}
_NAMED = ("task", "strategy", "trust model", "mode", "canary")


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

    @property
    def row(self) -> tuple[str, ...]:
        """What tells the cell's row from all others: the values of `_NAMED`."""
        config = self.config
        return config.task, config.strategy, config.trust_model, self.mode, self.kind


def cells(language_model: Path) -> Iterator[Cell]:
    """Yield all attacks of the table."""
    for method in METHODS:
        changes: dict[str, Any] = {"strategy": method, "num-clients": CLIENTS}
        yield Cell("digits", PAIRED, GRADIENT, 0.8, CANARIES // CLIENTS, changes=changes)
    yield Cell("digits-secure-sum", PAIRED, GRADIENT, 0.8, CANARIES, changes=ONE_SUM)
    for method in ("ffa-lora", "rolora", "as-lora"):
        changes = {"strategy": method, "num-clients": ONE_RUN_CLIENTS, "partitioner": "iid"}
        changes |= {"min-records": 1}  # A canary's own gradient takes the place of its record's.
        yield Cell("digits", ONE_RUN, GRADIENT, 0.4, 1, ONE_RUN_RECORDS, changes)
    yield Cell("digits", BLACK_BOX, LABEL, 0.25, 1200, changes=SMALL)
    changes = {**SMALL, "strategy": "ffa-lora", "partitioner": "iid", "partition-column": ""}
    changes |= {"min-records": 1, "lr-schedule": "constant", "optimizer": "sgd"}
    changes |= {"lr-a": 0.05, "lr-b": 0.05}
    yield Cell(str(language_model), BLACK_BOX, TOKENS, 0.25, 1000, changes=changes)


def quick() -> Iterator[Cell]:
    """Yield the attacks of the short form."""
    for method in ("ffa-lora", "rolora"):
        yield Cell("digits", PAIRED, GRADIENT, 0.2, 300, changes={"strategy": method})


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


def rows_of(table: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the rows of a table that was written before, by what names them."""
    if not table.is_file():
        return {}
    rows: list[dict[str, Any]] = json.loads(table.read_text("utf-8"))["rows"]
    return {tuple(row[name] for name in _NAMED): row for row in rows}


def named(cell: Cell, words: Sequence[str]) -> bool:
    """Tell whether the words name a cell: of each kind of word, one has to, if there is any."""
    given = {MODES.get(word, word) for word in words}
    kinds = (set(TRUST_MODELS), set(METHODS), set(MODES.values()))
    return all(given & kind & set(cell.row) or not given & kind for kind in kinds)


def save(output: Path, confidence: float, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows that there are, so that a run that is stopped keeps what it found."""
    content = {"confidence": confidence, "rows": rows}
    write_content(output / "table.json", "python -m benchmarks.audit", content)
    replace_file(output / "table.md", table_of(rows).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack all cells, show and write each row as it is ready, and draw one attack."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two methods, fewer runs")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*MODES, *METHODS, *TRUST_MODELS),
        help="rows of these modes, methods and trust models; keep the others",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help=f"folder of the results ({RESULTS.name})")
    given = parser.parse_args(arguments)
    output: Path | None = given.output or (None if given.quick else RESULTS)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    say: Callable[[str], object] = Console().print
    with (
        tempfile.TemporaryDirectory() as scratch,
        executor(given.workers, Path(scratch) / "log") as execute,
    ):
        every = list(quick() if given.quick else cells(make(Path(scratch))))
        confidence = QUICK if given.quick else 1 - (1 - CONFIDENCE) / len(every)
        chosen = [cell for cell in every if named(cell, given.only or ())]
        rows = rows_of(output / "table.json") if output and given.only else {}
        for number, cell in enumerate(chosen, start=1):
            about = (cell.config, cell.mode, cell.kind, cell.records, cell.runs, confidence)
            found = attack(*about, execute)
            rows[cell.row] = row_of(cell, found)
            say(f"{number} of {len(chosen)}: {rows[cell.row]}")
            if output:
                known = [rows[cell.row] for cell in every if cell.row in rows]
                save(output, QUICK if given.quick else CONFIDENCE, known)
            if output and found.settings["strategy"] == "rolora" and cell.mode == PAIRED:
                write_json(output / "digits-rolora.json", found.as_json())
                plot_audit(found, output / "digits-rolora.png")
    raise SystemExit(any(row["verdict"] == VIOLATED for row in rows.values()))


if __name__ == "__main__":
    main()
