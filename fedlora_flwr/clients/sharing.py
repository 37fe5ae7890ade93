"""Checks of what an order asks for, above all of a share of a secure sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedlora_flwr.clients.sum_exchange import shares_of
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.trust import SECURE_SUM
from fedlora_flwr.environment import in_simulation
from fedlora_flwr.errors import InvalidValue, OrderRefused
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.ledger_file import LOCAL
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.secure_sum.grid import Grid
from fedlora_flwr.wire import NUM_EXAMPLES, STAGE, SUM_NOISE, UPLOAD
from fedlora_flwr.wire.limits import Residues
from fedlora_flwr.wire.order import Order

# Two machines may differ in the last digits of a calibrated σ. The ledger decides on ε.
_ROUNDED = 1e-6


def check_asked(order: Order, config: RunConfig) -> None:
    """Refuse a weighting that tells a secret of this client, or a missing round number.

    Raises
    ------
    OrderRefused
        The order asks for such a weighting, or names no round where learning rates change.
    """
    if order.weighting not in ("uniform", config.weighting):
        raise OrderRefused(
            f"weighting = {order.weighting!r} is refused, because this client does not tell "
            "the run its number of records or its noise. Use weighting = 'uniform', or set "
            "weighting on the client."
        )
    if config.rates_change and not order.server_round:
        raise OrderRefused(
            "The learning rates change over the rounds, but the message does not name its "
            "round. Send 'server-round', or set lr-schedule = 'constant'."
        )


def check_order(order: Order, config: RunConfig) -> int:
    """Return m, the shares of the noise, or 0 if this client adds all of the noise itself.

    Raises
    ------
    OrderRefused
        The order asks for a share but this client adds all noise itself, or the other way round;
        too few clients would share the noise; or nothing hides the upload.
    """
    if not config.secure_sum:
        asks = order.cohort or order.sum_noise or order.grid_norm or order.stage
        return shares_of(order, config) if asks else 0
    if in_simulation():
        if order.stage:
            raise OrderRefused(f"A simulated client's upload is not masked. Send no {STAGE!r}.")
    elif order.stage != UPLOAD:
        # An upload has the noise of one share only, so it must not leave unmasked.
        raise OrderRefused(
            "With trust-model = 'secure-sum' this client uploads only to a masked sum, but the "
            "message asks for an upload without masks. Use one of this package's strategies with "
            "trust-model = 'secure-sum' on the server, too."
        )
    return shares_of(order, config)


def agreed(own: Mechanism, order: Order) -> Mechanism:
    """Return the mechanism with the noise of the whole sum, or the client's own without a sum.

    All clients add equal shares to one agreed noise. If a client's budget needs more noise, the
    client cannot take part: a larger share of its own would not keep its promise.

    Raises
    ------
    InvalidValue
        The sum has less noise than this client's own budget needs.
    """
    if not order.sum_noise:
        return own
    if order.sum_noise < own.noise_multiplier * (1 - _ROUNDED):
        allowed = f"at least {own.noise_multiplier:.6g}, the noise that this client's budget needs"
        raise InvalidValue(SUM_NOISE, order.sum_noise, allowed)
    return replace(own, noise_multiplier=order.sum_noise)


def round_grid(
    order: Order,
    mechanism: Mechanism,
    shares: int,
    trainer: LocalTrainer,
    plan: ComponentPlan | None,
) -> Grid | None:
    """Return the round's grid, on which the sum has the noise of the mechanism; None without one.

    Raises
    ------
    InvalidValue
        The noise does not fit the grid, or is too little for it.
    """
    if not shares or plan is None:
        return None
    grid = Grid.of(mechanism.noise_multiplier, shares, order.grid_norm)
    parameters = trainer.adapted.parameters
    size = sum(parameters[name].numel() for name in trainer.layout.active(plan, 1))
    grid.check_slack(size, trainer.config.planned_steps)
    return grid


def trust_of(shares: int) -> str:
    """Return the trust model as a row of the ledger states it; for a sum it includes m.

    Without masks an upload would have had the noise multiplier σ/√m (see `epsilon_unmasked`).
    """
    return f"{SECURE_SUM}, 1 of {shares} shares" if shares else LOCAL


def with_records(shares: Mapping[str, Residues], records: int) -> dict[str, Residues]:
    """Add the number of records to a share. Only its sum over all clients is opened."""
    return {**shares, NUM_EXAMPLES: np.array([records], np.uint32)}
