"""The record of an audit: what was attacked, what was claimed, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora_flwr.audit.bounds import Bound

HOLDS, VIOLATED, WEAK = "holds", "violated", "too weak to say"
TELLING = 0.25
"""An attack that finds less than this share of the claim says little about it."""


@dataclass(frozen=True)
class AuditRecord:
    """What ``audit.json`` holds.

    Parameters
    ----------
    settings : Mapping[str, Any]
        The configuration of the attacked runs, by key.
    attack : str
        What the attacker does, in words.
    runs, absent, present : int
        Number of runs, and of trials without and with the canary.
    claim, delta : float
        The largest ε that a client's ledger claimed, at δ.
    confidence : float
        Of all bounds together: the chance that each of them is below the true ε.
    bounds : Sequence[Bound]
        The lower bounds.
    seconds : float
        How long the audit took.
    """

    settings: Mapping[str, Any]
    attack: str
    runs: int
    absent: int
    present: int
    claim: float
    delta: float
    confidence: float
    bounds: Sequence[Bound]
    seconds: float

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

    def as_json(self) -> dict[str, Any]:
        """Return the record as the file has it."""
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict}
