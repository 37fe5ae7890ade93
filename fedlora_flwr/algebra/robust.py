"""Robust means: a few of the vectors cannot move them far.

A client may lie about its weight. So weights never decide which clients are left out; values and
the number of clients do. Weights only weigh the vectors that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import normalize
from fedlora_flwr.errors import InvalidValue

Array64 = NDArray[np.float64]


def trimmed_mean(stack: NDArray[np.floating], weights: Sequence[float], cut: int) -> Array64:
    """Leave out the ``cut`` smallest and largest values of each coordinate, and average the rest.

    With at most ``cut`` bad clients, each coordinate lies between two honest values. Among equal
    values, an earlier client's counts as smaller. Source: Yin et al., arXiv 1803.01498,
    definition 2.

    Parameters
    ----------
    stack : ndarray, (N, ...)
        One array per client.
    weights : Sequence[float]
        One weight per client, above 0.
    cut : int
        Values to leave out at either end, at least 0 and below N/2.

    Returns
    -------
    ndarray, (...)
        In fp64.

    Raises
    ------
    InvalidValue
        Nothing is left, or the weights cannot be normalized.
    """
    clients = len(stack)
    if not 0 <= 2 * cut < clients:
        raise InvalidValue("cut", cut, f"0 or more, and less than half of {clients} clients")
    shares = normalize(weights)
    if len(shares) != clients:
        raise InvalidValue("weights", list(weights), f"one for each of {clients} clients")
    if (shares == shares[0]).all():
        middle = np.sort(stack, axis=0)[cut : clients - cut]
        return np.asarray(middle.mean(axis=0, dtype=np.float64))
    kept = np.argsort(stack, axis=0, kind="stable")[cut : clients - cut]
    chosen = shares[kept]
    values = np.take_along_axis(stack, kept, axis=0).astype(np.float64)
    return np.asarray((values * chosen).sum(axis=0) / chosen.sum(axis=0))


def median(stack: NDArray[np.floating], weights: Sequence[float]) -> Array64:
    """Take the middle value of each coordinate, or the mean of the two middle ones.

    It equals `trimmed_mean` with as many values left out as possible. Weights only decide between
    two middle values: a weighted median, at which half of all *weight* is reached, would follow the
    client that states the largest weight. Source: Yin et al., arXiv 1803.01498, definition 1.

    Parameters
    ----------
    stack : ndarray, (N, ...)
        One array per client.
    weights : Sequence[float]
        One weight per client, above 0.

    Returns
    -------
    ndarray, (...)
        In fp64.
    """
    return trimmed_mean(stack, weights, (len(stack) - 1) // 2)


def squared_distances(rows: Sequence[NDArray[np.floating]]) -> Array64:
    """Return the squared distance of each pair of clients, (N, N).

    Parameters
    ----------
    rows : Sequence[ndarray]
        One array per client, of any one shape.
    """
    found = np.zeros((len(rows), len(rows)))
    wide = [np.asarray(row, np.float64).ravel() for row in rows]
    for one, left in enumerate(wide):
        for other in range(one):
            gap = left - wide[other]
            found[one, other] = found[other, one] = gap @ gap
    return found


def krum(distances: Array64, bad: int) -> list[int]:
    """Choose the ``N - bad`` clients whose nearest neighbors are nearest.

    A client's score is the sum of the squared distances to its ``N - bad - 2`` nearest others.
    Among equal scores, the earlier client's comes first. Several clients are kept and averaged, as
    in Multi-Krum, because one upload has √N times the privacy noise of the mean of N. Source:
    Blanchard et al., arXiv 1703.02757, section 4.

    Parameters
    ----------
    distances : ndarray, (N, N)
        See `squared_distances`.
    bad : int
        Clients that may be bad, at least 0; N must be at least 2 bad + 3.

    Returns
    -------
    list[int]
        Positions of the chosen clients, ascending.

    Raises
    ------
    InvalidValue
        There are too few clients.
    """
    clients = len(distances)
    if bad < 0 or clients < 2 * bad + 3:
        raise InvalidValue("clients", clients, f"at least {2 * max(bad, 0) + 3} for {bad} bad ones")
    others = np.sort(distances + np.diag(np.full(clients, np.inf)), axis=1)
    scores = others[:, : clients - bad - 2].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[: clients - bad].tolist())
