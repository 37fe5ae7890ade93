"""Checks of how many clients and records a secure sum has. They need no accountant."""

from __future__ import annotations

from math import isqrt

from fedlora_flwr.config.unit import RECORD, counted
from fedlora_flwr.errors import InvalidValue

__all__ = ["check_dropouts", "check_union", "honest_shares"]


def honest_shares(asked: int, dropouts: int, colluding: int) -> int:
    """Return m: how many shares of noise every opened sum holds that the server cannot know.

    Parameters
    ----------
    asked : int
        N: clients that the round asks.
    dropouts : int
        t: clients that may fail to answer. If more of them fail, the sum is not opened.
    colluding : int
        c: clients that may tell the server their noise.

    Raises
    ------
    InvalidValue
        No honest client is left.

    References
    ----------
    arXiv 2007.05553, section 4.1: noise for the clients that remain honest.

    Examples
    --------
    >>> honest_shares(10, dropouts=1, colluding=1)
    8
    """
    check_dropouts(asked, dropouts, colluding)
    return asked - dropouts - colluding


def check_dropouts(asked: int, dropouts: int, colluding: int) -> None:
    """Refuse more dropouts than the masks withstand if a server tells clients different things.

    Parameters
    ----------
    asked, dropouts, colluding : int
        N, t and c.

    Raises
    ------
    InvalidValue
        A number is negative, or N - c is not above t(t + 2). A server could then open a sum over
        fewer than N - t clients (the reason is in `fedlora_flwr.secure_sum.party`).

    Examples
    --------
    >>> check_dropouts(10, dropouts=2, colluding=1)
    """
    if dropouts < 0 or colluding < 0 or asked - dropouts - colluding < 1:
        allowed = f"whole numbers from 0, together fewer than the {asked} clients of a round"
        raise InvalidValue("dropouts and colluding", (dropouts, colluding), allowed)
    if asked - colluding <= dropouts * (dropouts + 2):
        most = isqrt(asked - colluding) - 1
        allowed = (
            f"at most {most} where {asked} clients are asked and colluding = {colluding}: with "
            "more, a server that tells clients different things may open the sum of fewer clients"
        )
        raise InvalidValue("dropouts", dropouts, allowed)


def check_union(delta: float, records: int, unit: str = RECORD) -> None:
    """Refuse a δ that is too large for the records of all clients together.

    The sum is one mechanism on the union of all records, so δ has to be below 1/Σn. A δ that is
    only below 1/n of one client would allow the sum to reveal one record of the union completely.

    Parameters
    ----------
    delta : float
        δ.
    records : int
        Σn over all clients of the federation.
    unit : str (default: "record")
        What is counted: records or users.

    Raises
    ------
    InvalidValue
        δ is not below 1/Σn.
    """
    if not delta < 1 / records:
        allowed = (
            f"a number below 1/Σn = {1 / records:.3g}: a secure sum is taken over the n = "
            f"{counted(records, unit)} of all clients together"
        )
        raise InvalidValue("delta", delta, allowed)
