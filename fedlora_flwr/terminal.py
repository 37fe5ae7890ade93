"""What every command does with an error, and with a signal that ends it."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console

from fedlora_flwr.errors import FedLoRAError
from fedlora_flwr.files import FileTrouble

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Parameters
    ----------
    number : int
        Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def guard(work: Callable[[], None]) -> None:
    """Turn an error that the package raises on purpose into one message and exit code 1.

    So is trouble with a file. The signals that ask a process to end, among them that of a closed
    terminal, all end the work as Ctrl-C does: what it has begun is cleared up.
    """
    with _handlers(_interrupt):
        try:
            work()
        except FedLoRAError as error:
            raise _ended(f"Error: {error}", 1) from None
        except BrokenPipeError:  # Whoever reads the output has had enough.
            raise
        except (OSError, sqlite3.Error) as error:
            raise _ended(f"Error: {FileTrouble.of(error)}", 1) from None
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise _ended("Interrupted.", 128 + number) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal cut short what clears up; it must be sure to end."""
    with _handlers(lambda *_: None):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until a process has started, which could not read the rest of its orders.

    A process that starts meanwhile does not see Ctrl-C, which a terminal sends to all: it ends
    with this one.
    """
    waiting: list[int] = []
    with _handlers(lambda number, _: waiting.append(number)):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in waiting[:1]:
        signal.raise_signal(number)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Answer signals that end a process, except for those that are ignored, e.g. by nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.getsignal(sign) for sign in _ENDING}
    taken = [sign for sign in _ENDING if before[sign] not in (signal.SIG_IGN, None)]
    try:
        for sign in taken:
            signal.signal(sign, handler)
        yield
    finally:
        for sign in taken:
            signal.signal(sign, before[sign])


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def _ended(text: str, code: int) -> typer.Exit:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(code)
