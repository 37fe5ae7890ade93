"""Answers the messages of a masked sum that do not ask for an upload. They need no model."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from fedlora_flwr.clients.sum_exchange import SumExchange
from fedlora_flwr.environment import in_simulation
from fedlora_flwr.wire import OPEN_SUM, SEAL_SHARES, SHOW_KEYS, STAGE
from fedlora_flwr.wire.records import read_order, train_records
from fedlora_flwr.wire.report import Report

BETWEEN = (SHOW_KEYS, SEAL_SHARES, OPEN_SUM)
"""The messages of a masked sum before and after the upload."""


def stage_of(message: Message) -> str:
    """Return the stage of a masked sum that a message names."""
    for config in message.content.config_records.values():
        if isinstance(stage := config.get(STAGE), str):
            return stage
    return ""


def answer_between(exchange: Callable[[], SumExchange], message: Message, identity: str) -> Message:
    """Answer a message of a masked sum that does not ask for an upload. It needs no model.

    Parameters
    ----------
    exchange : callable
        Makes the client's exchange.
    message : Message
        The strategy's message.
    identity : str
        The client's identity.

    Raises
    ------
    OrderRefused
        See `SumExchange.answer`, and `fedlora_flwr.wire.records.read_order`.
    """
    order, _ = read_order(message.content)
    # Simulated clients do not mask: the process that they run in sees everything anyway.
    packet = b"" if in_simulation() else exchange().answer(order)
    return Message(train_records(Report(client=identity, packet=packet)), reply_to=message)
