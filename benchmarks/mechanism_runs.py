"""Short private runs of the methods on the digits: accuracy, sharpness, and error of averaging.

A library of `benchmarks.mechanisms`, without a command of its own. All runs have the same data,
rounds, rates, clip norm and ε. Seeds change partition, adapters, batches and noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedlora_flwr import RunResult, sharpness, simulate
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import A, B, ComponentPlan
from fedlora_flwr.strategies import LALoRA
from fedlora_flwr.strategies.base import FedLoRA

Row: TypeAlias = dict[str, Any]


class AFirst(LALoRA):
    """LA-LoRA as in its public code: A trains in odd local steps, and B in even ones."""

    def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
        """Alternate A and B over the local steps."""
        return ComponentPlan.uniform(A, B)


@dataclass(frozen=True)
class Kind:
    """One row of the grid.

    Parameters
    ----------
    strategy : str or type
        The method.
    settings : Mapping[str, Any]
        What differs from the other rows.
    curved : bool
        Whether the curvature is measured, too.
    """

    strategy: str | type[FedLoRA]
    settings: Mapping[str, Any] = field(default_factory=dict)
    curved: bool = False


RATES = {"lr_a": 0.2, "lr_b": 0.171, "lr_head": 0.091}
"""Those that the comparison of docs/results.md chose at ε = 1 for most methods."""
TWICE = {"lr_a": 2 * RATES["lr_a"], "lr_b": 2 * RATES["lr_b"], "lr_head": 2 * RATES["lr_head"]}
GRID: Mapping[str, Kind] = {
    "dp-lora": Kind("dp-lora", curved=True),
    "ffa-lora": Kind("ffa-lora", curved=True),
    "rolora": Kind("rolora", curved=True),
    "la-lora": Kind("la-lora", curved=True),
    "as-lora": Kind("as-lora", curved=True),
    "la-lora, binomial filter": Kind("la-lora", {"filter": "binomial"}, curved=True),
    "la-lora, A first": Kind(AFirst),
    "la-lora, each update twice": Kind("la-lora", TWICE),
    "la-lora, twice, and B's rate doubled": Kind("la-lora", {**TWICE, "lr_b": 2 * TWICE["lr_b"]}),
    "as-lora, fixed turns": Kind("as-lora", {"selection": "fixed"}),
    "as-lora, one choice for all": Kind("as-lora", {"groups": "tied"}),
    "as-lora, a choice per layer": Kind("as-lora", {"groups": "layer"}),
    "as-lora, secant": Kind("as-lora", {"curvature": "secant"}),
}


@dataclass(frozen=True)
class Size:
    """How much is run.

    Parameters
    ----------
    seeds : tuple[int, ...]
        Seeds of the runs.
    rounds, clients, steps : int
        Rounds, clients, and local steps per round.
    records, probes : int
        Public records and probes of the curvature.
    rows : tuple[str, ...]
        Names of `GRID`.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    rounds: int = 12
    clients: int = 6
    steps: int = 4
    records: int = 180
    probes: int = 10
    rows: tuple[str, ...] = tuple(GRID)


QUICK = Size((1,), 2, 2, 2, 12, 2, ("dp-lora", "la-lora, A first"))
EPSILON, RADIUS, DRAWS = 1.0, 0.3, 5


def measure(size: Size) -> Iterator[Row]:
    """Run the grid, the seeds of a row one after another; yield a row for each run."""
    for name in size.rows:
        for seed in size.seeds:
            with tempfile.TemporaryDirectory(prefix="fedlora-mechanisms-") as folder:
                result = run(GRID[name], seed, size, Path(folder))
                row: Row = {"row": name, "seed": seed, **_outcome(result)}
                if GRID[name].curved:
                    row |= _curvature(result, size)
                yield row


def run(kind: Kind, seed: int, size: Size, folder: Path) -> RunResult:
    """Run one kind with one seed."""
    settings: dict[str, Any] = {
        **RATES,
        "epsilon": EPSILON,
        "num_clients": size.clients,
        "num_rounds": size.rounds,
        "local_steps": size.steps,
        "eval_every": size.rounds,
        "seed": seed,
        "reproducible": True,
        "device": "cpu",
        **kind.settings,
    }
    return simulate("digits", strategy=kind.strategy, output=folder, progress=False, **settings)


def _outcome(result: RunResult) -> Row:
    rounds = result.rounds
    last, errors = rounds.iloc[-1], rounds["mean_error"].iloc[1:]
    return {
        "accuracy": float(last["accuracy"]),
        "loss": float(last["loss"]),
        "mean_error": " ".join(f"{error:.4g}" for error in errors),
    }


def _curvature(result: RunResult, size: Size) -> Row:
    """Return the curvature in the factors and in the adapted layers' weights."""
    found: Row = {}
    for name, parts in (("factors", ("A", "B")), ("weights", ("W",))):
        seen = sharpness(
            result, parts=parts, radius=RADIUS, draws=DRAWS, records=size.records,
            probes=size.probes, device="cpu",
        )  # fmt: skip
        random, ascent = seen.moved
        found |= {
            f"top_{name}": seen.largest_eigenvalue,
            f"trace_{name}": seen.trace,
            f"trace_error_{name}": seen.trace_error,
            f"random_{name}": seen.metrics["accuracy"] - random.metrics["accuracy"],
            f"ascent_{name}": seen.metrics["accuracy"] - ascent.metrics["accuracy"],
        }
    return found
