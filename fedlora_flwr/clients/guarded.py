"""Decides which errors of a client a server may read."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from logging import ERROR
from typing import TypeVar

from flwr.common.logger import log

from fedlora_flwr.environment import in_simulation
from fedlora_flwr.errors import (
    BudgetExhausted,
    ClientFailed,
    FedLoRAError,
    NotInstalled,
    OrderRefused,
)

T = TypeVar("T")


def guarded(call: Callable[..., T], *args: object) -> T:
    """Call a function, and raise only errors that a server may read.

    Flower sends an exception's text to the server, and such a text may contain a record. So only
    the errors listed below are raised. Every other error becomes a fixed sentence with a random
    number; the client's own log holds this number and the whole error. In a simulation, server and
    client are the same machine, and errors of this package are raised unchanged.

    Raises
    ------
    OrderRefused
        Unchanged: it says what is wrong with the message, and no record was opened.
    BudgetExhausted
        With a fixed text.
    ClientFailed
        In place of every other error.
    """
    try:
        return call(*args)
    except (OrderRefused, ClientFailed):
        raise
    except BudgetExhausted as error:
        if in_simulation():
            raise
        log(ERROR, "%s", error)
        raise BudgetExhausted("budget exhausted: this client takes no further part") from None
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # A Rust library's panic is not an Exception and may quote text.
        number = secrets.token_hex(4)
        if missing := NotInstalled.of(error):
            log(ERROR, "The client failed (error %s). %s", number, missing)
        else:
            log(ERROR, "The client failed (error %s).", number, exc_info=error)
        if in_simulation():
            if missing:
                raise missing from None
            if isinstance(error, FedLoRAError):
                raise
            kind = type(error).__name__
            raise ClientFailed(f"{kind} on the client; its own log says more") from None
        raise ClientFailed(
            f"The client could not do what was asked (error {number}). Its own log says why."
        ) from None
