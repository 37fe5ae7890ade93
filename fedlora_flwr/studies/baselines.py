"""Which baselines a comparison gets beside what its user names, and how many runs they add."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.studies.baseline_names import (
    ALL,
    AUTO,
    BASELINES,
    CHOICES,
    HEAD_ONLY,
    NO_TRAINING,
    NONE,
)
from fedlora_flwr.studies.comparison import Comparison
from fedlora_flwr.tasks.registry import build_task

# A comparison that takes days must not take two weeks because of an option's default.
MOST_ADDED = 0.5


@dataclass(frozen=True)
class Chosen:
    """The baselines of a comparison, and what they cost.

    Parameters
    ----------
    names : tuple[str, ...]
        The baselines.
    named : int
        Runs of the rows and budgets that the user names.
    added : int
        Runs that the baselines add at most.
    left_out : dict[str, str]
        Baselines that could be added and are not, each with the reason.
    """

    names: tuple[str, ...]
    named: int
    added: int
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Yield sentences for a screen."""
        if self.names:
            share = f"{self.added / self.named:.0%}"
            names = ", ".join(self.names)
            yield f"{names}: {self.added:,} more beside {self.named:,} runs (+{share})"
        for name, reason in self.left_out.items():
            yield f"{name} is left out: {reason}"

    def as_json(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {"names": [*self.names], "runs": self.added, "left_out": self.left_out}


def with_baselines(comparison: Comparison, text: str) -> tuple[Comparison, Chosen]:
    """Add baselines to a comparison.

    ``auto`` adds them in the order of `BASELINES` as long as they add at most half as many runs
    again. A comparison of one row always gets ``head-only``, since it would compare nothing.
    ``auto`` and ``all`` leave out what cannot run; what is named must run.

    Parameters
    ----------
    comparison : Comparison
        What the user names, without baselines.
    text : str
        ``auto``, ``all``, ``none``, or names of `BASELINES` joined by commas.

    Raises
    ------
    InvalidValue
        A name is not one of a baseline, or a setting cannot be used.
    """
    named = comparison.most_runs
    if text not in (AUTO, ALL):
        found = replace(comparison, baselines=_read(text))
        return found, Chosen(found.baselines, named, found.most_runs - named)
    left_out: dict[str, str] = {}
    for name in BASELINES:
        more = replace(comparison, baselines=(*comparison.baselines, name))
        if reason := _refusal(comparison, name):
            left_out[name] = reason
        elif text == AUTO and not _fits(more, comparison, name, named):
            runs = more.most_runs - comparison.most_runs
            left_out[name] = f"{runs:,} runs more would be too many. --baselines all adds them"
        else:
            comparison = more
    added = comparison.most_runs - named
    return comparison, Chosen(comparison.baselines, named, added, left_out)


def _fits(more: Comparison, before: Comparison, name: str, named: int) -> bool:
    if more.most_runs == before.most_runs or (name == HEAD_ONLY and len(before.methods) == 1):
        return True
    return more.most_runs - named <= MOST_ADDED * named


def _read(text: str) -> tuple[str, ...]:
    names = [] if text == NONE else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BASELINES:
            raise unknown("--baselines", name, CHOICES)
    return tuple(name for name in BASELINES if name in names)


def _refusal(comparison: Comparison, name: str) -> str:
    """Return why a baseline cannot run; empty if it can."""
    config = comparison.config
    if name == NO_TRAINING:
        return ""
    if name == HEAD_ONLY and not (
        config.train_head and config.share_head and build_task(config.task, config).head
    ):
        return "no head is trained and shared here"
    epsilon = comparison.epsilons[0] if name == HEAD_ONLY else math.inf
    try:
        shared = replace(config, epsilon=epsilon)
        for method in replace(comparison, baselines=(name,)).rows:
            method.of(shared)
    except InvalidValue as error:
        return str(error)
    return ""
