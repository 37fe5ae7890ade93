"""Errors that users of the package may see."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_LONGEST = 1000  # characters of a value that an error shows
_LONGEST_REASON = 300  # characters of another package's error
_MOST_LISTED = 40  # accepted names that an error lists; of more, it lists the most similar ones
_MOST_NEAR = 8  # similar names that an error suggests


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
        The accepted values, in words, e.g. ``"a number above 0"``.
    near : tuple[str, ...] (default: none)
        Accepted names that resemble the given one. The text suggests them first.
    """

    def __init__(self, key: str, value: object, allowed: str, near: tuple[str, ...] = ()) -> None:
        expected = f"did you mean {either(near)}? Expected" if near else "expected"
        super().__init__(f"{key} = {_shown(value)} cannot be used: {expected} {allowed}.")
        self.key = key
        self.value = value
        self.allowed = allowed
        self.near = near

    def __reduce__(self) -> tuple[type[InvalidValue], tuple[str, object, str, tuple[str, ...]]]:
        """Rebuild the error from its arguments, so that it can be sent between processes."""
        return type(self), (self.key, self.value, self.allowed, self.near)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits.
        return "an integer of too many digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class OrderRefused(FedLoRAError):
    """A client refuses a server's message, before it has opened a record.

    The text of this error may be sent to the server. It may contain what the server sent, what the
    package accepts, the limits in the device's file, which servers may read, and names of arrays
    and the hash of the model, which are public. It never contains anything else from the device's
    file or from a record.
    """


EXTRAS: Mapping[str, tuple[str, ...]] = {
    "client": ("torch", "transformers", "peft", "opacus", "dp_accounting", "safetensors", "scipy"),
    "plots": ("matplotlib", "pandas"),
    "text": ("tokenizers", "jinja2", "datasets", "huggingface_hub", "pyarrow"),
    "vision": ("timm", "PIL", "sklearn", "matplotlib", "datasets", "huggingface_hub", "pyarrow"),
    "simulation": ("ray", "flwr_datasets"),
    "generation": ("rouge_score",),
    "quantized": ("bitsandbytes",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "optuna": ("optuna",),
}
"""The modules that each extra of this package installs, as in ``pyproject.toml``.

If a single module is missing, an error suggests the first extra that has it.
"""


class NotInstalled(FedLoRAError, ImportError):
    """An optional package is not installed. The text gives the command that installs it."""

    @classmethod
    def of(cls, error: BaseException) -> NotInstalled | None:
        """Return this error for an import that failed because an extra is not installed.

        Parameters
        ----------
        error : BaseException
            Any error. If it has another cause, ``None`` is returned.
        """
        if isinstance(error, cls):
            return error
        module = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        if not _extra_of(module) or _installed(module):
            return None
        return cls(_not_installed([module], [_extra_of(module)]))


def require(*wanted: str) -> None:
    """Check that packages are installed before work that needs them; they are not imported.

    Parameters
    ----------
    *wanted : str
        Names of `EXTRAS`, or single modules that one of them installs.

    Raises
    ------
    NotInstalled
        A package is not installed.
    """
    absent: dict[str, list[str]] = {}
    for name in wanted:
        extra = name if name in EXTRAS else _extra_of(name)
        modules = EXTRAS[extra] if name == extra else (name,)
        if missing := [module for module in modules if not _installed(module)]:
            absent.setdefault(extra, []).extend(missing)
    if absent:
        modules = tuple(dict.fromkeys(module for found in absent.values() for module in found))
        raise NotInstalled(_not_installed(modules, list(absent)))


def _not_installed(modules: Sequence[str], extras: Sequence[str]) -> str:
    if len(modules) > 3:
        modules = (modules[0], f"{len(modules) - 1} more packages")
    *first, last = modules
    subject = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    return f"{subject} not installed. Run pip install 'fedlora-flwr[{','.join(extras)}]'."


def _extra_of(module: str) -> str:
    return next((extra for extra, modules in EXTRAS.items() if module in modules), "")


def _installed(module: str) -> bool:
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return False
    # A spec without an origin is a plain folder among the user's files, such as `datasets`.
    return found is not None and found.origin is not None


class CannotStart(FedLoRAError):
    """A device cannot start.

    Parameters
    ----------
    what : str
        The problem.
    fix : str
        What the user should do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}."


class PrivacyViolation(FedLoRAError):
    """A private step would release something that is not clipped or has no noise."""


class SuspectReply(FedLoRAError):
    """A client's upload has values that no honest client sends."""


class BudgetExhausted(FedLoRAError):
    """A release would take a client past its privacy budget."""


class RunOver(FedLoRAError):
    """A run ends before its last round, and what it has done counts."""


class StoppedEarly(RunOver):
    """The run's evaluations are not getting better."""


class BudgetsSpent(RunOver):
    """All clients' budgets are spent. The run ends; if it has trained, it counts as complete."""


class ClientFailed(FedLoRAError):
    """A client could not do a round. The text tells the kind of error, but no details."""


class ModelFailed(FedLoRAError):
    """A model could not be built, trained or evaluated; the text tells what failed and a remedy."""


class FederationAborted(FedLoRAError):
    """The server stopped a run, because a continued run would give a wrong result."""


def unknown(
    key: str,
    given: str,
    names: Iterable[str],
    *,
    before: str = "",
    after: str = "",
    value: object = None,
    listed_by: str = "",
) -> InvalidValue:
    """Return the error for an unknown name; its text suggests the most similar names first.

    Of more than 40 accepted names it lists the most similar ones, or says what lists all of them.

    Parameters
    ----------
    key : str
        Name of the setting.
    given : str
        The name that the user wrote.
    names : Iterable[str]
        Every accepted name.
    before, after : str (default: "")
        Words around the list of names.
    value : object, optional
        The whole value of the setting, if ``given`` is only a part of it.
    listed_by : str (default: "")
        Command that lists all accepted names.
    """
    every = sorted(names)
    listed = f"one of {', '.join(map(repr, every))}"
    if len(every) > _MOST_LISTED:
        similar = difflib.get_close_matches(str(given), every, n=_MOST_NEAR, cutoff=0)
        listed = f"one of {len(every)} names, such as {', '.join(map(repr, similar))}"
        if listed_by:
            listed = f"one of the {len(every)} that `{listed_by}` lists"
    allowed = f"{before}{listed}{after}"
    return InvalidValue(key, given if value is None else value, allowed, near_names(given, every))


def near_names(given: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that begin with the given one; if there are none, the most similar name.

    Case is ignored, and an underscore counts as a dash.
    """
    plain, every = given.strip().lower().replace("_", "-"), list(names)
    longer = [name for name in every if len(plain) > 1 and name.lower().startswith(plain)]
    similar = difflib.get_close_matches(plain, every, n=1)
    return tuple(longer[:_MOST_NEAR] or similar)


def either(names: Sequence[str]) -> str:
    """Write names as a choice: ``'a', 'b' or 'c'``."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


class LedgerDamaged(FedLoRAError):
    """A ledger cannot be trusted or used, so its clients may not release anything.

    The text names the file, the damage and a remedy.
    """


def one_line(error: BaseException) -> str:
    """Return the text of another package's error on one line, cut to 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


@contextmanager
def explained(doing: str, advice: str) -> Iterator[None]:
    """Turn errors of other packages and of a user's own code into one sentence.

    Parameters
    ----------
    doing : str
        The work that may fail, as the subject of the sentence.
    advice : str
        What the user should change if it fails, in whole sentences.

    Raises
    ------
    ModelFailed
        An error that is not of this package was raised. If it comes from the user's own code, the
        message names the file and the line.
    NotInstalled
        The error comes from an optional package that is not installed.
    """
    try:
        yield
    except FedLoRAError:
        raise
    except Exception as error:
        if missing := NotInstalled.of(error):
            raise missing from error
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".: ")
        raise ModelFailed(f"{doing} failed ({reason}{_place(error)}). {advice}") from error


@contextmanager
def refusing() -> Iterator[None]:
    """Turn an `InvalidValue` about a message's value into an `OrderRefused`.

    Raises
    ------
    OrderRefused
        It replaces `InvalidValue` and has its text.
    """
    try:
        yield
    except InvalidValue as error:
        raise OrderRefused(str(error)) from error


@contextmanager
def untold() -> Iterator[None]:
    """Keep texts of errors from the server, where records may be open or a task's own code runs.

    Raises
    ------
    FedLoRAError
        It replaces `OrderRefused` and `ClientFailed`, whose texts would be sent to the server. The
        task's code may raise these types as well.
    """
    try:
        yield
    except (OrderRefused, ClientFailed) as error:
        raise FedLoRAError(f"The task failed, or reading its records did: {error}") from error


def _place(error: BaseException) -> str:
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        foreign = "site-packages" in frame.filename or "lib/python" in frame.filename
        if not foreign and not frame.filename.startswith((own, "<")):
            return f", in {frame.filename}, line {frame.lineno}"
    return ""
