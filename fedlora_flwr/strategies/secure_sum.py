"""A round whose uploads are opened as a sum: what a strategy needs for it, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any, Protocol

import numpy as np
from flwr.common.logger import log
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.strategies.expected import Expected
from fedlora_flwr.strategies.replies import RoundReport, Upload
from fedlora_flwr.wire import NUM_EXAMPLES
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order

Ask = Callable[[Mapping[int, Order], int], dict[int, bytes]]
"""Sends an order to each node, and returns the packets of those that answered with one of a length
in bytes; 0 allows any length."""


class Opener(Protocol):
    """Opens sums and takes the server's step with them.

    Attributes
    ----------
    dropouts : int
        t: clients of a round that may be missing.
    noise_multiplier : float
        σ of the sum. Every client adds its share of this noise.
    grid_norm : int
        C/γ: the clip norm in units of the grid.
    """

    dropouts: int
    noise_multiplier: float
    grid_norm: int

    @property
    def remark(self) -> str:
        """What the run's summary says of the sum."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried from one round to the next: arrays and plain values."""
        ...

    def load_state_dict(self, found: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        ...

    def agree(self, ask: Ask, order: Order, nodes: Sequence[int]) -> Mapping[int, Order]:
        """Return what to send to each client of a round that can upload.

        Raises
        ------
        InvalidValue
            Too few clients can upload.
        """
        ...

    def total(
        self, ask: Ask, nodes: Sequence[int], shares: Mapping[str, Residues]
    ) -> dict[str, NDArray[np.int64]]:
        """Open the sum of the uploads of some nodes, and reveal nothing else about them.

        Parameters
        ----------
        ask : callable
            See `Ask`.
        nodes : Sequence[int]
            The nodes that uploaded.
        shares : Mapping[str, ndarray]
            The sum of their uploads modulo 2³², masked as they are.

        Raises
        ------
        InvalidValue
            The sum cannot be opened.
        """
        ...

    def step(
        self, server_round: int, current: Arrays, total: Mapping[str, NDArray[np.int64]], count: int
    ) -> dict[str, NDArray[np.floating]]:
        """Return what trained, after one step by the opened sum.

        Parameters
        ----------
        server_round : int
            Round, from 1.
        current : Arrays
            The global arrays.
        total : Mapping[str, ndarray]
            The opened sum.
        count : int
            Number of records of the clients in it.
        """
        ...


def asks_for_shares(order: Order, opener: Opener, asked: int) -> Order:
    """Add to an order what a client needs for its share."""
    return replace(
        order, cohort=asked, sum_noise=opener.noise_multiplier, grid_norm=opener.grid_norm
    )


def check_kind(upload: Upload, by_sum: bool) -> None:
    """Refuse an upload, or a part of one, that is of the other trust model.

    Raises
    ------
    InvalidValue
        It holds arrays under a secure sum, or shares of one where there is none.
    """
    if wrong := upload.arrays if by_sum else upload.shares:
        allowed = "only whole numbers modulo 2³²" if by_sum else "only floating-point numbers"
        trust = "secure-sum" if by_sum else "local"
        allowed += f", as the run has trust-model = {trust!r}"
        raise InvalidValue("uploaded arrays", sorted(wrong)[:5], allowed)


def check_share(expected: Expected, current: Arrays, shares: Mapping[str, Residues]) -> None:
    """Refuse an upload that is not exactly what the plan trains, and the number of records.

    Raises
    ------
    InvalidValue
        Arrays are missing, unknown or of other shapes.
    """
    if NUM_EXAMPLES not in shares or shares[NUM_EXAMPLES].shape != (1,):
        allowed = f"also {NUM_EXAMPLES!r}, which clients with this run's trust model send"
        raise InvalidValue("uploaded shares", sorted(shares)[:5], allowed)
    arrays = {name: share for name, share in shares.items() if name != NUM_EXAMPLES}
    expected.check(arrays)
    for name, share in arrays.items():
        if share.shape != current[name].shape:
            raise InvalidValue(f"shape of {name}", share.shape, str(current[name].shape))


def orders_of_sum(
    opener: Opener, ask: Ask, order: Order, asked: Sequence[int], report: RoundReport
) -> Mapping[int, Order]:
    """Return what to send to each client of a round under a secure sum; to nobody if it is void.

    Parameters
    ----------
    opener : Opener
        Agrees with the clients.
    ask : callable
        See `Ask`.
    order : Order
        The round's order.
    asked : Sequence[int]
        The nodes of the round's clients.
    report : RoundReport
        The round's report, which is marked as not opened if the round is void.
    """
    try:
        return opener.agree(ask, asks_for_shares(order, opener, len(asked)), asked)
    except InvalidValue as error:
        _void(report, error)
        return {}


def opened_upload(
    opener: Opener,
    ask: Ask,
    current: Arrays,
    report: RoundReport,
    shares: Mapping[str, Residues],
    nodes: Mapping[str, int],
) -> list[Upload]:
    """Open a round's sum, step by it, and return the result as the one upload of the round.

    A strategy aggregates it as it would a single client's arrays.

    Parameters
    ----------
    opener : Opener
        Opens and steps.
    ask : callable
        See `Ask`.
    current : Arrays
        The global arrays.
    report : RoundReport
        The round; its details say how many shares the sum has, or that it was not opened.
    shares : Mapping[str, ndarray]
        The sum of the round's uploads modulo 2³².
    nodes : Mapping[str, int]
        The node of each client.

    Returns
    -------
    list[Upload]
        One upload; none where more clients are missing than the noise allows for. Then nothing is
        opened.
    """
    found, missing = len(report.uploads), report.sent - len(report.uploads)
    report.details = {**report.details, "shares": found, "opened": True}
    try:
        if missing > opener.dropouts:
            allowed = f"at most {opener.dropouts} (dropouts)"
            raise InvalidValue("missing clients", f"{missing} of {report.sent}", allowed)
        total = opener.total(ask, [nodes[u.client] for u in report.uploads], shares)
    except InvalidValue as error:
        _void(report, error)
        return []
    (count,) = total.pop(NUM_EXAMPLES)
    arrays = opener.step(report.server_round, current, total, int(count))
    return [Upload("sum", arrays, 1.0, {})]


def _void(report: RoundReport, why: Exception) -> None:
    """Note that nothing of a round is opened."""
    report.details = {**report.details, "opened": False}
    log(WARNING, "Round %d is void, and its sum is not opened. %s", report.server_round, why)
