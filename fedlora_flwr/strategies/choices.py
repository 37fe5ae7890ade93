"""Choose between A and B by score, and judge whether a run's choices beat chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from fedlora_flwr.algebra.gains import Average, Estimate
from fedlora_flwr.plan import A, B

CLEAR = 2.0
"""Standard errors from which on a difference counts as clear."""
BY_CHANCE = 2 * NormalDist().cdf(-CLEAR)
_LARGEST = 1e6  # of z, so that it stays a number in JSON


@dataclass(frozen=True)
class Choice:
    """What a group trains in a round.

    Parameters
    ----------
    mode : str
        ``"A"`` or ``"B"``.
    z : float or None
        A's lead over B, in units of its standard error; None where scores had no part in it.
    chance : float or None
        Probability with which A was drawn.
    """

    mode: str
    z: float | None = None
    chance: float | None = None


@dataclass
class Scores:
    """What one group's factors have gained, and what curvature took from that."""

    gains: dict[str, Average] = field(default_factory=lambda: {A: Average(), B: Average()})
    bends: dict[str, Average] = field(default_factory=lambda: {A: Average(), B: Average()})

    @classmethod
    def of(cls, gains: Mapping[str, Any], bends: Mapping[str, Any]) -> Scores:
        """Rebuild scores from the output of ``dataclasses.asdict``."""
        return cls(
            *({f: Average(**values) for f, values in found.items()} for found in (gains, bends))
        )

    def before(
        self, server_round: int, decay: float, curved: bool
    ) -> tuple[Estimate | None, Estimate | None]:
        """Return the scores of A and B before a round; None where there is none yet.

        Curvature counts once it is known of both: a cost that only one of them has to bear would
        choose the other.
        """
        gains = [self.gains[factor].at(server_round, decay) for factor in (A, B)]
        costs = [self.bends[factor].at(server_round, decay) for factor in (A, B)]
        a, b = (
            _net(gain, cost) if curved and gain and cost and None not in costs else gain
            for gain, cost in zip(gains, costs, strict=True)
        )
        return a, b

    def unseen(self, server_round: int) -> int:
        """Return for how many rounds the factors went without a new score, together."""
        return sum(gain.age(server_round) for gain in self.gains.values())


def _net(gain: Estimate, cost: Estimate) -> Estimate:
    """Subtract a cost that was made of the same rounds as the gain.

    Half of each round's gain is in it, so their covariance is half of the gain's variance, and the
    difference has no more variance than the cost. A quarter of the gain's is added for costs of
    neighboring rounds, which share one.
    """
    return Estimate(gain.value - cost.value, cost.variance + gain.variance / 4)


def lead(a: Estimate, b: Estimate, drift: float = 0.0) -> float:
    """Return A's lead over B in units of its standard error; without any error, ±1e6.

    Parameters
    ----------
    a, b : Estimate
        The scores.
    drift : float (default: 0)
        By how much the difference may have changed unseen, in units of ``|a| + |b|``.
    """
    difference = a.value - b.value
    error = math.hypot(
        math.sqrt(a.variance), math.sqrt(b.variance), drift * (abs(a.value) + abs(b.value))
    )
    if difference == 0 or math.isinf(error):
        return 0.0
    size = abs(difference)
    return math.copysign(size / error if error * _LARGEST > size else _LARGEST, difference)


def chance_of_a(z: float, selection: str, temperature: float, explore: float) -> float:
    """Return the probability of A.

    Parameters
    ----------
    z : float
        See `lead`.
    selection : str
        ``"sample"``: Φ(z / temperature), the probability that A's score is the larger one where
        the temperature is 1. ``"argmax"``: 1 or 0, and ½ without a lead.
    temperature : float
        Above 0.
    explore : float
        Least probability of either.
    """
    if selection == "argmax":
        chance = 0.5 + 0.5 * ((z > 0) - (z < 0))
    else:
        chance = NormalDist().cdf(z / temperature)
    return min(max(chance, explore), 1 - explore)


def verdict(leads: Sequence[float], decay: float) -> str:
    """Say in one sentence whether a run's choices can be told from chance.

    Parameters
    ----------
    leads : Sequence[float]
        z of every choice by score.
    decay : float
        Weight of the past in the scores. Choices that share most of their past count as few.

    Returns
    -------
    str
        Empty where no choice was made by score.
    """
    if not leads:
        return ""
    share = sum(abs(z) > CLEAR for z in leads) / len(leads)
    independent = max(len(leads) * (1 - decay) / (1 + decay), 1.0)
    allowed = BY_CHANCE + CLEAR * math.sqrt(BY_CHANCE * (1 - BY_CHANCE) / independent)
    figures = (
        f"in {share:.0%} of {len(leads)} choices between A and B, the scores differ by more than "
        f"two standard errors; by chance it would be {BY_CHANCE:.0%}"
    )
    if share <= allowed:
        return f"cannot be told from chance: {figures}"
    return f"follow the scores: {figures}"
