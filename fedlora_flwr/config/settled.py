"""Values that stand for a choice that a command makes before the run begins.

They are ``precision = "auto"`` and ``num-clients = 0``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    from fedlora_flwr.config.run_config import RunConfig

AUTO = "auto"
CLIENTS = 10
"""Simulated clients, if neither the user nor the partitioner names a number."""


def check_settled(config: RunConfig) -> None:
    """Refuse a precision that has not been chosen: each process could choose another one.

    Raises
    ------
    InvalidValue
        The precision is ``"auto"``.
    """
    if config.precision == AUTO:
        allowed = (
            "'fp32' or 'bf16' here, since all machines of a run need the same. "
            "Only a simulation, a plan, a comparison or an audit on this machine chooses by itself"
        )
        raise InvalidValue("precision", AUTO, allowed)


def check_counted(config: RunConfig) -> None:
    """Refuse a secure sum whose server does not know among how many clients the noise is shared.

    Raises
    ------
    InvalidValue
        It is a secure sum, and ``num-clients`` is 0.
    """
    if config.secure_sum and not config.num_clients:
        allowed = (
            "the number of clients here, among whom a secure sum shares the noise. Only a "
            "simulation, a plan, a comparison or an audit on this machine counts them by itself"
        )
        raise InvalidValue("num-clients", 0, allowed)
