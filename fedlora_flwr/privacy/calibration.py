"""Clients' mechanisms, from a run's budget and each client's number of records or users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.config import RunConfig
from fedlora_flwr.privacy.account import UNBOUND, Terms
from fedlora_flwr.privacy.budget import calibrate, check_budget
from fedlora_flwr.privacy.clip_weights import ClipWeights
from fedlora_flwr.privacy.lifetime import calibrate_run
from fedlora_flwr.privacy.mechanism import Mechanism


def calibrated_mechanism(
    config: RunConfig,
    num_units: int,
    *,
    terms: Terms = UNBOUND,
) -> Mechanism:
    """Work out one client's mechanism: σ from its own q and the planned number of steps.

    Under a secure sum, all clients have the run's q, and σ is the noise of the whole sum: the sum
    is one mechanism on the union of all clients' records, or users.

    Parameters
    ----------
    config : RunConfig
        Budget, ledger scope, clip norm and weights, batch size and planned steps. All planned steps
        count, even if a round asks only some of the clients: the server chooses the rounds of a
        client, and may choose all of them.
    num_units : int
        The client's n: its number of records, or of users where ``unit = "user"``.
    terms : Terms
        What earlier runs on the client's data have fixed (see `Ledger.terms`).

    Raises
    ------
    InvalidValue
        The client cannot keep the promise: δ ≥ 1/n, the batch size is larger than n, or no noise is
        enough for the budget.
    """
    weights = ClipWeights.configured(config)
    if not config.private:
        # Gradients are still clipped, so a run with and a run without privacy differ in noise only.
        batch_size = min(config.batch_size, num_units)
        return Mechanism(
            0.0, config.clip_norm, batch_size, num_units, weights=weights, unit=config.unit
        )
    common = config.sample_rate if config.secure_sum else None
    least = 1 if common else config.batch_size
    check_budget(config.epsilon, config.delta, least, num_units, config.unit)
    expected = common * num_units if common else config.batch_size
    rate, steps = common or config.batch_size / num_units, config.planned_steps
    if config.ledger_scope == "lifetime" and (config.run_epsilon or terms.order):
        sigma = calibrate_run(
            config.epsilon,
            config.delta,
            rate,
            steps,
            run_epsilon=config.run_epsilon or config.epsilon,
            order=terms.order,
        )
    else:
        sigma = calibrate(config.epsilon, config.delta, rate, steps)
    # Where the first run has fixed σ, the ledger would refuse a smaller one.
    sigma = max(sigma, terms.noise_multiplier)
    return Mechanism(sigma, config.clip_norm, expected, num_units, common, weights, config.unit)


class Mechanisms(Sequence[Mechanism]):
    """The mechanism of each client of a simulation; clients of one size share theirs.

    Parameters
    ----------
    sizes : NDArray[np.int64]
        n of each client, shape (clients,).
    of_size : Mapping[int, Mechanism]
        The mechanism of each size.
    """

    def __init__(self, sizes: NDArray[np.int64], of_size: Mapping[int, Mechanism]) -> None:
        self.sizes, self.of_size = sizes, dict(of_size)

    @classmethod
    def calibrated(
        cls,
        config: RunConfig,
        sizes: NDArray[np.int64],
        shown: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> Mechanisms:
        """Calibrate the mechanism of each size, in the order in which clients have them.

        Parameters
        ----------
        config : RunConfig
            As for `calibrated_mechanism`.
        sizes : NDArray[np.int64]
            n of each client, shape (clients,).
        shown : callable, optional
            Passes on the sizes, e.g. to show the progress.

        Raises
        ------
        InvalidValue
            A client cannot keep the promise.
        """
        found, first = np.unique(sizes, return_index=True)
        in_order: list[int] = found[np.argsort(first)].tolist()
        return cls(sizes, {size: calibrated_mechanism(config, size) for size in shown(in_order)})

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mechanisms):
            return NotImplemented
        return self.of_size == other.of_size and np.array_equal(self.sizes, other.sizes)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, client: int) -> Mechanism: ...

    @overload
    def __getitem__(self, client: slice) -> list[Mechanism]: ...

    def __getitem__(self, client: int | slice) -> Mechanism | list[Mechanism]:
        """Return the mechanism of a client, or those of a slice."""
        if isinstance(client, slice):
            return [self.of_size[size] for size in self.sizes[client].tolist()]
        return self.of_size[int(self.sizes[client])]
