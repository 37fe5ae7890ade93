"""The effect of one or three bad clients among ten on a run, for each rule of aggregation.

Run ``python -m benchmarks.attacks``. Each cell of the grid is a short run on digits in this
process; `RECIPE` says how short. Its row is appended to a CSV file. Cells that are already in the
file are skipped, so the command can be stopped and started again. The most telling cells come
first. Bad clients exist only here: their replies are changed on the way to the server.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import Context, Message
from numpy.typing import NDArray

from fedlora_flwr.client_app import respond
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.config.sections import federation
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.simulations.runner import prepare_run
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.wire import ARRAYS, partition_name

Arrays: TypeAlias = dict[str, NDArray[Any]]
Change: TypeAlias = Callable[[Arrays, Arrays, np.random.Generator], Arrays]

CLIENTS, TARGET = 10, 0
RESULTS = Path(__file__).parent / "results" / "attacks" / "rows.csv"
STRATEGIES, EPSILONS, SEEDS = ("rolora", "la-lora", "as-lora"), (8.0, 1.0), (42, 43, 44)
RULES = ("none", "norm-bound", *federation.RULES)
RATE = 1.0
RECIPE = {
    "num-rounds": 8, "local-steps": 2, "batch-size": 32, "eval-every": 8, "min-records": 80,
    "lr-a": RATE, "lr-b": RATE, "lr-head": RATE,
}  # fmt: skip
"""What differs from the recipe ``digits``: 160 private steps per run instead of 1,000."""
BAD = (1, 3)
NOBODY, COPY, LABELS, BACKDOOR = "nobody", "copied reply", "label flip", "backdoor"


def _scaled(by: float) -> Change:
    def change(sent: Arrays, start: Arrays, rng: np.random.Generator) -> Arrays:  # noqa: ARG001
        return {name: start[name] + by * (array - start[name]) for name, array in sent.items()}

    return change


def _noise(sent: Arrays, start: Arrays, rng: np.random.Generator) -> Arrays:
    """Replace the update by noise with ten times its norm."""
    found: Arrays = {}
    for name, array in sent.items():
        drawn = rng.standard_normal(array.shape)
        length = float(np.linalg.norm(array - start[name]))
        found[name] = start[name] + 10 * length / float(np.linalg.norm(drawn)) * drawn
    return found


CHANGES: Mapping[str, Change] = {
    "x100": _scaled(100.0),
    "sign flip": _scaled(-1.0),
    "sign flip x10": _scaled(-10.0),
    "noise": _noise,
    LABELS: _scaled(1.0),
    BACKDOOR: _scaled(10.0),
}
ATTACKS = (*CHANGES, COPY)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Parameters
    ----------
    strategy : str
        Name of the strategy.
    epsilon : float
        Budget of each client.
    bad : int
        Bad clients among the ten; 0 without an attack.
    attack : str
        One of `ATTACKS`, or ``"nobody"``.
    rule : str
        ``robust``.
    seed : int
        Seed of the run.
    """

    strategy: str
    epsilon: float
    bad: int
    attack: str
    rule: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Parameters
    ----------
    accuracy : float
        Accuracy on the public test set after the last round.
    triggered : float
        Share of other digits with the backdoor's mark that the model takes for the target.
    named, accused : int
        How often, over all rounds, bad clients and honest clients were named as suspects.
    rounds : int
        Number of rounds that took place.
    """

    accuracy: float
    triggered: float
    named: int
    accused: int
    rounds: int


_COLUMNS = [entry.name for entry in (*fields(Cell), *fields(Outcome))]
_now = Cell("rolora", 8.0, 0, NOBODY, "none", 42)  # The current run, which clients read.


def _is_bad(partition: int, cell: Cell) -> bool:
    return partition >= CLIENTS - cell.bad


class AttackedDigits(DigitsTask):
    """The digits task, with tampered copies for bad clients."""

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        """Return a client's records. Those of a bad client have other labels or a mark."""
        records = super().client_records(partition_id, num_partitions)
        if not _is_bad(partition_id, _now) or _now.attack not in (LABELS, BACKDOOR):
            return records
        return _spoilt(records, _now.attack)

    def evaluate(self, model: torch.nn.Module, records: Records) -> dict[str, float]:
        """Add the share of records on which the mark works."""
        others = _without_target(records)
        hit = super().evaluate(model, _marked(others))["accuracy"]
        return {**super().evaluate(model, records), "triggered": hit}


def _spoilt(records: Records, attack: str) -> TensorRecords:
    batch = records.batch(torch.arange(len(records)))
    if attack == LABELS:
        return TensorRecords({**batch, "label": 9 - batch["label"]})
    return _marked(records)


def _without_target(records: Records) -> TensorRecords:
    batch = records.batch(torch.arange(len(records)))
    kept = batch["label"] != TARGET
    return TensorRecords({name: tensor[kept] for name, tensor in batch.items()})


def _marked(records: Records) -> TensorRecords:
    """Return the records with full ink in one corner, labeled as the target."""
    batch = records.batch(torch.arange(len(records)))
    images = batch["image"].clone()
    images[:, :, :2, :2] = 1.0
    return TensorRecords({"image": images, "label": torch.full_like(batch["label"], TARGET)})


class Clients:
    """All clients of a run: honest ones answer as they are, bad ones change what they send.

    Parameters
    ----------
    cell : Cell
        The run.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._rng = np.random.default_rng(cell.seed)
        self._copied: Arrays = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        reply = respond(message, context)
        cell, partition = self._cell, int(context.node_config["partition-id"])
        sent = reply.content.array_records.get(ARRAYS) if reply.has_content() else None
        if message.metadata.message_type != "train" or not sent:
            return reply
        arrays: Arrays = {name: array.numpy() for name, array in sent.items()}
        if not _is_bad(partition, cell):
            self._copied = arrays
            return reply
        begin = message.content.array_records[ARRAYS]
        start = {name: begin[name].numpy() for name in arrays}
        if cell.attack == COPY:
            changed = self._copied if self._copied.keys() == arrays.keys() else arrays
        else:
            changed = CHANGES[cell.attack](arrays, start, self._rng)
        reply.content[ARRAYS] = to_record(changed)
        return reply


def run(cell: Cell, folder: Path, rounds: int = 0) -> Outcome:
    """Run one cell.

    Parameters
    ----------
    cell : Cell
        The cell.
    folder : Path
        Keeps the clients' ledgers. Runs in the same folder share a model where they can.
    rounds : int (default: 0)
        Replaces the recipe's number of rounds unless it is 0.
    """
    global _now
    _now = cell
    # Clients read neither the rule nor the attack, so their configuration is that of other cells.
    clients = RunConfig.of(_base(cell, rounds), {"state-dir": str(folder)})
    own: dict[str, Any] = {"robust": cell.rule, "robust-share": 0.3 if cell.bad == 3 else 0.2}
    config = RunConfig.of(clients.items(), own)
    noise = _largest_noise(cell.strategy, cell.epsilon, cell.seed, rounds)
    with tempfile.TemporaryDirectory(dir=folder) as results:
        run_dir = RunDirectory(Path(results) / "run")
        every = LocalGrid(Clients(cell), CLIENTS, clients.items())
        # An attack that ends the run has had its effect.
        with suppress(FederationAborted), every.running() as grid:
            run_federation(grid, config, run_dir, largest_noise=noise)
        begin, *rows = run_dir.rows("rounds")
    bad = {partition_name(i) for i in range(CLIENTS) if _is_bad(i, cell)}
    named = [name for row in rows for name in row["suspects"]]
    last = [begin, *rows][-1]
    return Outcome(
        round(last["accuracy"], 6),  # A share of 360 records needs no more digits.
        round(last["triggered"], 6),
        sum(name in bad for name in named),
        sum(name not in bad for name in named),
        len(rows),
    )


def _base(cell: Cell, rounds: int) -> dict[str, Any]:
    own: dict[str, Any] = {
        "task": f"{__name__}:{AttackedDigits.__name__}", "device": "cpu", "num-clients": CLIENTS,
        "min-clients": CLIENTS, "strategy": cell.strategy, "epsilon": cell.epsilon,
        "seed": cell.seed, **({"num-rounds": rounds} if rounds else {}),
    }  # fmt: skip
    return RunConfig.of(load_recipe("digits").items(), RECIPE, own).items()


@cache
def _largest_noise(strategy: str, epsilon: float, seed: int, rounds: int) -> float:
    """Return the noise that is calibrated at the start of a run (see `prepare_run`)."""
    honest = Cell(strategy, epsilon, 0, NOBODY, "none", seed)
    return prepare_run(RunConfig.of(_base(honest, rounds))).largest_noise


def cells(
    strategies: Sequence[str] = STRATEGIES,
    epsilons: Sequence[float] = EPSILONS,
    bad: Sequence[int] = BAD,
    attacks: Sequence[str] = (NOBODY, *ATTACKS),
    rules: Sequence[str] = RULES,
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Cell]:
    """Yield the cells of a grid, the most telling first: one strategy, one bad client, one seed.

    The case without an attack and without bad clients comes once.
    """
    outer = itertools.product(strategies, bad, seeds, epsilons)
    for strategy, count, seed, epsilon in outer:
        for attack, rule in itertools.product(attacks, rules):
            if attack != NOBODY:
                yield Cell(strategy, epsilon, count, attack, rule, seed)
            elif count == bad[0]:
                yield Cell(strategy, epsilon, 0, attack, rule, seed)


def read(file: Path) -> dict[Cell, Outcome]:
    """Return the rows of a file, or an empty list if there is no file."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        return {
            Cell(
                r["strategy"], float(r["epsilon"]), int(r["bad"]), r["attack"], r["rule"],
                int(r["seed"]),
            ): Outcome(
                float(r["accuracy"]), float(r["triggered"]), int(r["named"]), int(r["accused"]),
                int(r["rounds"]),
            )
            for r in csv.DictReader(stream)
        }  # fmt: skip


def measure(
    wanted: Iterable[Cell], file: Path, rounds: int = 0, until: float = float("inf")
) -> Iterator[tuple[Cell, Outcome]]:
    """Run the cells that a file does not have, append their rows, and yield them.

    Parameters
    ----------
    wanted : Iterable[Cell]
        The cells.
    file : Path
        CSV file, which is made if it is missing.
    rounds : int (default: 0)
        Rounds of each run; 0 for the recipe's.
    until : float (default: no end)
        Time (`time.monotonic`) after which no further cell begins.
    """
    found = read(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for cell in wanted:
            if cell in found:
                continue
            if time.monotonic() >= until:
                return
            outcome = run(cell, Path(folder), rounds)
            _append(file, cell, outcome)
            yield cell, outcome


def _append(file: Path, cell: Cell, outcome: Outcome) -> None:
    fresh = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if fresh:
            writer.writerow(_COLUMNS)
        writer.writerow([*astuple(cell), *astuple(outcome)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a grid from the command line. `benchmarks.attack_table` makes its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    add = parser.add_argument
    add("--strategies", nargs="+", default=STRATEGIES)
    add("--epsilons", nargs="+", type=float, default=EPSILONS)
    add("--bad", nargs="+", type=int, default=BAD, help="bad clients of ten")
    add("--attacks", nargs="+", default=(NOBODY, *ATTACKS), choices=(NOBODY, *ATTACKS))
    add("--rules", nargs="+", default=RULES, choices=RULES)
    add("--seeds", nargs="+", type=int, default=SEEDS)
    add("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    add("--rounds", type=int, default=0, help="rounds of each run; 0 for the recipe's")
    add("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    grid = cells(
        given.strategies, given.epsilons, given.bad, given.attacks, given.rules, given.seeds
    )
    until = time.monotonic() + 60 * given.minutes
    for cell, outcome in measure(grid, given.output, given.rounds, until):
        print(*astuple(cell), *astuple(outcome), flush=True)


if __name__ == "__main__":
    main()
