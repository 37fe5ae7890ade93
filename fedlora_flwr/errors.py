"""Errors that users of the package meet."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 1000  # characters of a value that an error shows
_LONGEST_REASON = 300  # characters of another package's error


class FedLoRAError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidValue(FedLoRAError, ValueError):
    """A setting or an argument has a value that cannot be used.

    Parameters
    ----------
    key : str
        Name of the setting, as the user writes it.
    value : object
        The value that was given.
    allowed : str
        What would be accepted, e.g. ``"a number above 0"``.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key} = {_shown(value)} cannot be used: expected {allowed}.")
        self.key = key
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[InvalidValue], tuple[str, object, str]]:
        """Rebuild from the three arguments, so that the error crosses processes."""
        return type(self), (self.key, self.value, self.allowed)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits.
        return "an integer of too many digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class OrderRefused(FedLoRAError):
    """A client refuses what a server sent, and has not opened a record yet.

    The text of this error alone may travel to the server. It names what the server sent, what the
    package accepts, and what the device's file states for servers to read: its limits. It never
    names anything else that the device's file or a record holds.
    """


class PrivacyViolation(FedLoRAError):
    """Something would leave the private step unclipped or without noise."""


class BudgetExhausted(FedLoRAError):
    """A release would take a client past its privacy budget."""


class BudgetsSpent(FedLoRAError):
    """No client may be asked for another round; a run that has trained is complete."""


class ClientFailed(FedLoRAError):
    """A client could not do a round; says of what kind the error was, and no more."""


class ModelFailed(FedLoRAError):
    """A model could not be built, trained or measured; says what failed, and what to change."""


class FederationAborted(FedLoRAError):
    """The server stopped a run because going on would give a wrong result."""


def one_of(choices: Iterable[str], given: str) -> str:
    """Describe allowed names, the nearest match first.

    Parameters
    ----------
    choices : Iterable[str]
        Every accepted name.
    given : str
        What the user wrote.

    Returns
    -------
    str
        Text for the ``allowed`` argument of `InvalidValue`.
    """
    names = sorted(choices)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return "one of " + ", ".join(repr(name) for name in names) + hint


class LedgerDamaged(FedLoRAError):
    """A ledger cannot be trusted or used, so nothing may be released on its account.

    The text names the file, what is wrong with it, and what to do.
    """


def one_line(error: BaseException) -> str:
    """Return the text of an error of another package in one line, cut where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


@contextmanager
def explained(doing: str, advice: str) -> Iterator[None]:
    """Turn errors of other packages and of a user's own code into one sentence.

    Parameters
    ----------
    doing : str
        What may fail, as the subject of the sentence.
    advice : str
        What to change then: whole sentences.

    Raises
    ------
    ModelFailed
        Anything but an error of this package was raised. The message names the place in the user's
        own code, if the error comes from there.
    """
    try:
        yield
    except FedLoRAError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".: ")
        raise ModelFailed(f"{doing} failed ({reason}{_place(error)}). {advice}") from error


def _place(error: BaseException) -> str:
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        foreign = "site-packages" in frame.filename or "lib/python" in frame.filename
        if not foreign and not frame.filename.startswith((own, "<")):
            return f", in {frame.filename}, line {frame.lineno}"
    return ""
