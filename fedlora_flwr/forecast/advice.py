"""Which method the measured rows support for a run like this one.

`advice.toml` holds what was measured. `python -m benchmarks.advice` makes it of the rows in
``benchmarks/results``, by the rule that docs/results.md states, and a test makes it again.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.config.trust import LOCAL

TABLE = Path(__file__).with_name("advice.toml")
PAGE = "docs/results.md#which-method-to-take"
"""Where the table is shown, below the repository."""
_RATES = ("lr-a", "lr-b", "lr-head")
# Rates belong to the steps that they were tuned for.
_STEPS = (
    "local-steps", "batch-size", "sample-rate", "clip-norm", "optimizer", "rank", "lora-alpha",
    "num-rounds",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What was measured of one kind of task, under one trust model, at one ε.

    Parameters
    ----------
    task, trust_model : str
        What the rows are of.
    epsilon : float
        Their budget; infinity means no privacy.
    recipe : str
        The recipe that was run.
    settings : Mapping[str, float or str]
        What to take: the strategy, its learning rates, and any other key.
    row : str
        Name of the row to take.
    accuracy : float
        Its mean after the last round, from 0 to 1.
    seeds : int
        How many seeds it has.
    reason : str
        Why it is taken: it "has the highest mean", "sends fewer bytes" than the row that has, or
        "publishes no sizes".
    best : str
        Name of the row with the highest mean.
    best_accuracy : float
        That mean.
    alike, behind, open : tuple[str, ...]
        Other rows: those that the seeds do not tell apart from the best, those that are told apart
        from it, and those that have too few seeds to say.
    adapters : str
        Whether adapters beat the head alone: ``"ahead"``, ``"behind"``, ``"alike"``, or
        ``"unknown"`` where the head alone, or too little, was measured.
    gain : float
        Mean of the best row with adapters minus that of the head alone; NaN if not measured.
    section : str
        Anchor of the rows' own section of docs/results.md.
    """

    task: str
    trust_model: str
    epsilon: float
    recipe: str
    settings: Mapping[str, float | str]
    row: str
    accuracy: float
    seeds: int
    reason: str
    best: str
    best_accuracy: float
    alike: tuple[str, ...]
    behind: tuple[str, ...]
    open: tuple[str, ...]
    adapters: str
    gain: float
    section: str


@dataclass(frozen=True)
class Advice:
    """What the measured rows support for a run.

    Parameters
    ----------
    measured : Measured or None
        The rows that it rests on; ``None`` where no rows are of this kind of task.
    changes : Mapping[str, float or str]
        Keys that the run would have to change to follow it.
    text : str
        One sentence.
    """

    measured: Measured | None
    changes: Mapping[str, float | str]
    text: str

    @property
    def followed(self) -> bool:
        """Whether the run has all that is advised."""
        return self.measured is not None and not self.changes

    def as_json(self) -> dict[str, Any]:
        """Return it in JSON types."""
        found = self.measured
        return {
            "text": self.text,
            "followed": self.followed,
            "changes": dict(self.changes),
            "recipe": found and found.recipe,
            "trust_model": found and found.trust_model,
            "epsilon": found.epsilon if found and math.isfinite(found.epsilon) else None,
            "row": found and found.row,
            "page": PAGE,
        }


@cache
def table() -> tuple[Measured, ...]:
    """Return all that was measured."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["measured"]
    return tuple(Measured(**_fields(row)) for row in rows)


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    named = {name.replace("-", "_"): value for name, value in row.items()}
    return {key: tuple(one) if isinstance(one, list) else one for key, one in named.items()}


def nearest(
    task: str, trust_model: str, epsilon: float, cells: Iterable[Measured] | None = None
) -> Measured | None:
    """Return the measured cell to take for a run: of its trust model, else of local noise.

    Among these it is the cell of the same ε, else the one whose logarithm is nearest. No privacy
    counts as more than any ε.

    Parameters
    ----------
    task, trust_model : str
        What the run is.
    epsilon : float
        Its budget; infinity means no privacy.
    cells : Iterable[Measured], optional
        What was measured; by default the package's table.

    Returns
    -------
    Measured or None
        None if nothing was measured of this task.
    """
    own = [one for one in (table() if cells is None else cells) if one.task == task]
    own = [one for one in own if one.trust_model == trust_model] or [
        one for one in own if one.trust_model == LOCAL
    ]

    def distance(one: Measured) -> tuple[bool, float]:
        finite = math.isfinite(one.epsilon)
        if not math.isfinite(epsilon):
            return finite, -one.epsilon if finite else 0.0
        return not finite, abs(math.log(one.epsilon / epsilon)) if finite else 0.0

    return min(own, key=distance, default=None)


def advise(config: RunConfig) -> Advice:
    """Return what the measured rows support for a run, in one sentence.

    Parameters
    ----------
    config : RunConfig
        The run.
    """
    found = nearest(config.task, config.trust_model, config.epsilon)
    if found is None:
        return Advice(
            None,
            {},
            f"there is none, since no methods were compared on the task {config.task!r}; fedlora "
            f"compare with head-only, rolora and dp-lora does it ({PAGE})",
        )
    own, recipe = config.items(), load_recipe(found.recipe).items()
    here = config.trust_model == found.trust_model
    same = here and all(own[key] == recipe[key] for key in _STEPS)
    wanted: dict[str, Any] = {"weighting": recipe["weighting"], **found.settings}
    kept = [key for key in found.settings if key not in _RATES] if here else ["strategy"]
    changes = {key: wanted[key] for key in (wanted if same else kept) if own[key] != wanted[key]}
    words = " ".join(f"-c {key}={_word(value)}" for key, value in changes.items())
    parts = [
        f"{f'take {words}' if changes else 'this run follows it'}: {_result(found)}",
        _GAINS[found.adapters].format(100 * abs(found.gain)),
        _carried(config, found),
        "" if same else f"rates for the steps of {found.recipe} may not fit yours, so tune them",
    ]
    return Advice(found, changes, f"{'; '.join(filter(None, parts))} ({PAGE})")


_GAINS = {
    "ahead": "adapters gain {:.1f} points over the head alone at best",
    "behind": "adapters lose at least {:.1f} points to the head alone",
    "alike": "no gain of adapters over the head alone is shown",
    "unknown": "nothing compares adapters with the head alone",
}


def _result(found: Measured) -> str:
    """Return what the row to take has reached, and why it is taken."""
    seeds = "one seed" if found.seeds == 1 else f"{found.seeds} seeds"
    result = f"{found.row} has {found.accuracy:.1%} in recipe {found.recipe} ({seeds})"
    if found.row != found.best:
        return (
            f"{result}, which is not told apart from the best ({found.best}, "
            f"{found.best_accuracy:.1%}), and {found.reason}"
        )
    if found.seeds == 1:
        return f"{result}, the most of all rows, but one seed shows no order"
    return f"{result}, the highest mean"


def _carried(config: RunConfig, found: Measured) -> str:
    """Return what the advice was carried over from; nothing if the very cell was measured."""
    budget = in_words(found.epsilon)
    if config.trust_model != found.trust_model:
        return f"carried over from local noise at {budget}, since no secure sum was measured"
    if config.epsilon != found.epsilon:
        return f"carried over from {budget}, the nearest that was measured"
    return ""


def in_words(epsilon: float) -> str:
    """Write a budget, e.g. ``"ε = 3"``.

    Examples
    --------
    >>> in_words(3.0), in_words(math.inf)
    ('ε = 3', 'no privacy')
    """
    return f"ε = {epsilon:g}" if math.isfinite(epsilon) else "no privacy"


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
