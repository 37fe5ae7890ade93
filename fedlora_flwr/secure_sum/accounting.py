"""The ε of a secure sum: for the union of all records, and for one upload if masking failed."""

from __future__ import annotations

from dataclasses import replace

from fedlora_flwr.privacy.budget import Segment, Spent, epsilon_spent
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.secure_sum.slack import widened

__all__ = ["epsilon_of_sum", "epsilon_unmasked"]


def epsilon_of_sum(
    grid: Grid, sample_rate: float, steps: int, delta: float, coordinates: int
) -> Spent:
    """Bound what all opened sums of a run tell about one record, including the slack of integers.

    Parameters
    ----------
    grid : Grid
        The grid of each round.
    sample_rate : float
        q: probability with which each record of every client joins a round.
    steps : int
        T: number of rounds.
    delta : float
        δ.
    coordinates : int
        D: largest number of coordinates that train at once.

    Returns
    -------
    Spent
        ε at ``delta``, and the accountant that gave it.

    References
    ----------
    The Poisson-subsampled Gaussian of `fedlora_flwr.privacy.budget`, widened as
    `fedlora_flwr.secure_sum.slack` says.
    """
    total = grid.slack(coordinates, steps)
    # The slack widens δ, so the accountant is asked at a smaller one.
    _, factor = widened(0.0, 1.0, total)
    spent = epsilon_spent([Segment(grid.noise_multiplier, sample_rate, steps)], delta / factor)
    return replace(spent, epsilon=widened(spent.epsilon, delta, total)[0])


def epsilon_unmasked(noise_multiplier: float, shares: int, segment: Segment, delta: float) -> Spent:
    """Bound what one client's own uploads tell about one of its records if the masks fail.

    Without masks only the noise of one share, σ/√m, protects an upload.

    Parameters
    ----------
    noise_multiplier : float
        σ of the whole sum.
    shares : int
        m.
    segment : Segment
        q and the number of rounds; its own σ is not read.
    delta : float
        δ.

    Returns
    -------
    Spent
        ε of the uploads on their own, infinite without noise.

    Examples
    --------
    >>> rounds = Segment(1.0, sample_rate=0.1, steps=10)
    >>> epsilon_unmasked(4.0, 16, rounds, 1e-3) == epsilon_spent([rounds], 1e-3)
    True
    """
    return epsilon_spent([replace(segment, noise_multiplier=noise_multiplier / shares**0.5)], delta)
