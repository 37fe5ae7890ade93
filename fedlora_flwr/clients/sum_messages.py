"""Answers Flower's messages of a masked sum that ask for no upload; that needs no model."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from fedlora_flwr.clients.sum_exchange import SumExchange
from fedlora_flwr.environment import in_simulation
from fedlora_flwr.wire import OPEN_SUM, SEAL_SHARES, SHOW_KEYS, STAGE
from fedlora_flwr.wire.records import read_order, train_records
from fedlora_flwr.wire.report import Report

BETWEEN = (SHOW_KEYS, SEAL_SHARES, OPEN_SUM)
"""The messages of a masked sum around the upload."""


def stage_of(message: Message) -> str:
    """Return the stage of a masked sum that a message names."""
    for config in message.content.config_records.values():
        if isinstance(stage := config.get(STAGE), str):
            return stage
    return ""


def answer_between(exchange: Callable[[], SumExchange], message: Message, identity: str) -> Message:
    """Answer a message of a masked sum that asks for no upload; it needs no model.

    Parameters
    ----------
    exchange : callable
        Makes the client's part.
    message : Message
        What the strategy sent.
    identity : str
        Who the client is.

    Raises
    ------
    OrderRefused
        See `SumExchange.answer`, and `fedlora_flwr.wire.records.read_order`.
    """
    order, _ = read_order(message.content)
    # Clients of a simulation have nothing to hide from the process that they run in.
    packet = b"" if in_simulation() else exchange().answer(order)
    return Message(train_records(Report(client=identity, packet=packet)), reply_to=message)
