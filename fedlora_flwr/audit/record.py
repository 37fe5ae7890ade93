"""The record of an audit: what was attacked, what was claimed, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fedlora_flwr.audit.bounds import Bound, Scores
from fedlora_flwr.config.trust import SECURE_SUM

PAIRED, ONE_RUN, BLACK_BOX = "paired", "one run", "black box"
HOLDS, VIOLATED, WEAK = "holds", "violated", "too weak to say"
TELLING = 0.25
"""An attack that finds less than this share of the claim says little about it."""


@dataclass(frozen=True)
class Counts:
    """What the bounds were counted from.

    Parameters
    ----------
    runs : int
        Number of runs.
    absent, present : int
        Canaries that did not and that did take part, over all runs.
    guesses, correct : Sequence[int]
        Guesses for each bound, and how many were right, if one run was attacked; otherwise empty.
    """

    runs: int
    absent: int
    present: int
    guesses: Sequence[int] = ()
    correct: Sequence[int] = ()

    @property
    def runs_in_words(self) -> str:
        """The number of runs, for a sentence."""
        return "one run" if self.runs == 1 else f"{self.runs:,} runs"


@dataclass(frozen=True)
class AuditRecord:
    """What ``audit.json`` holds.

    Parameters
    ----------
    settings : Mapping[str, Any]
        The configuration of the attacked runs, by key.
    mode : str
        `PAIRED`, `ONE_RUN` or `BLACK_BOX`.
    canary : str
        Kind of the canaries (see `fedlora_flwr.audit.canaries.KINDS`).
    counts : Counts
        What the bounds were counted from.
    curve : Sequence[tuple[float, float]]
        The attacker's false alarms and misses by threshold.
    claim, delta : float
        The largest ε that a client's ledger claimed, at δ.
    confidence : float
        Of all bounds together: the chance that each of them is below the true ε.
    bounds : Sequence[Bound]
        The lower bounds.
    seconds : float (default: 0.0)
        How long the audit took.
    recipe : Mapping[str, Any] (default: {})
        The recipe's own values of the keys for which the attacked runs have others.
    """

    settings: Mapping[str, Any]
    mode: str
    canary: str
    counts: Counts
    curve: Sequence[tuple[float, float]]
    claim: float
    delta: float
    confidence: float
    bounds: Sequence[Bound]
    seconds: float = 0.0
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The largest lower bound."""
        return max(bound.epsilon for bound in self.bounds)

    @property
    def ratio(self) -> float:
        """The largest lower bound over the claim."""
        return self.best / self.claim

    @property
    def verdict(self) -> str:
        """One of "holds", "violated" and "too weak to say"."""
        if self.best > self.claim:
            return VIOLATED
        return HOLDS if self.ratio >= TELLING else WEAK

    @property
    def attack(self) -> str:
        """What the attacker sees, in words."""
        steps = int(self.settings["num-rounds"]) * int(self.settings["local-steps"])
        length = "one step" if steps == 1 else f"{steps} steps"
        sees = "each upload"
        if self.settings["trust-model"] == SECURE_SUM:
            sees = "each opened sum"
        if self.mode == BLACK_BOX:
            return f"a stranger who has only the final model, after {length}"
        return f"the server, which sees {sees} of {length}"

    def timed(self, seconds: float) -> AuditRecord:
        """Return the record with the time that the audit took."""
        return replace(self, seconds=round(seconds, 1))

    def as_json(self) -> dict[str, Any]:
        """Return the record as the file has it."""
        return {**asdict(self), "attack": self.attack, "ratio": self.ratio, "verdict": self.verdict}


def curve_of(absent: Scores, present: Scores) -> list[tuple[float, float]]:
    """Return up to 101 pairs of false alarms and misses, from the highest threshold down."""
    levels = np.quantile(np.concatenate([absent, present]), np.linspace(1, 0, 101))
    rates = [(float((absent > at).mean()), float((present <= at).mean())) for at in levels]
    return [(round(alarm, 5), round(miss, 5)) for alarm, miss in dict.fromkeys(rates)]
