"""What a ledger holds of an account, summed up, and what that fixes for the next plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_flwr.config.unit import RECORD
from fedlora_flwr.privacy.accountants import Segment


@dataclass(frozen=True)
class Tally:
    """The ledger's rows of one run and one mechanism, summed up.

    Parameters
    ----------
    run : str
        The run.
    mechanism : Segment
        σ, q and the steps taken.
    planned : int
        Steps that the run has planned; 0 where a ledger of an earlier version doesn't say.
    order : float or None
        Order α of the client's Rényi filter; None if no row has fixed it.
    silent : float
        Seconds since the last row was written.
    unit : str
        The unit of the promise.
    """

    run: str
    mechanism: Segment
    planned: int
    order: float | None
    silent: float
    unit: str = RECORD


@dataclass(frozen=True)
class Terms:
    """What earlier runs on a client's data have fixed for the next plan.

    Parameters
    ----------
    order : float or None
        Order α of the Rényi filter; None if no filter decides.
    noise_multiplier, sample_rate : float
        Under fixed settings: the least σ and the largest q that a run may have. 0 and 1 where
        nothing is fixed.
    """

    order: float | None = None
    noise_multiplier: float = 0.0
    sample_rate: float = 1.0


UNBOUND = Terms()
"""The terms of a client without a history."""


def bounded(tallies: Sequence[Tally]) -> bool:
    """Tell whether the first run's settings bound those of every later step."""
    return all(is_bounded(t.mechanism, tallies[0].mechanism) for t in tallies)


def is_bounded(mechanism: Segment, first: Segment) -> bool:
    """Tell whether a mechanism has at least the first one's noise, and at most its rate."""
    return (
        mechanism.noise_multiplier >= first.noise_multiplier
        and mechanism.sample_rate <= first.sample_rate
    )
