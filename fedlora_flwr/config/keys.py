"""What a key of the run configuration is: its type, its range, and who decides it on a device.

A device trains for servers that it does not trust. So each key says who decides its value there,
and `fedlora_flwr.config.device_config` reads every value by that word. A key cannot be written
without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, field, fields
from enum import StrEnum
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple, TypeAlias

from fedlora_flwr.errors import InvalidValue, near_names

Value: TypeAlias = bool | int | float | str

_LONGEST_PATTERN = 500  # characters
_LONGEST_NAME = 128  # characters of a module's name that a repetition is counted for
_MOST_WAYS = 10_000_000  # in which a matcher may try a pattern on one name
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Check(NamedTuple):
    """Which values of a key's type are allowed.

    Parameters
    ----------
    holds : callable
        Tells whether a value is allowed.
    words : str
        Which values are.
    names : tuple[str, ...] (default: none)
        The only texts that are allowed, where they can be listed.
    """

    holds: Callable[[Any], bool]
    words: str
    names: tuple[str, ...] = ()


class Decider(StrEnum):
    """Who decides a value on a device. In a simulation the run decides everything."""

    DEVICE = "device"
    """The device's file. Where it is silent, the package's default. Never a server."""
    LIMITED = "run, within the device's limits"
    """The server. The package limits it, and the device's file may limit it further."""
    RUN = "run"
    """The server, within the package's limits."""
    PACKAGE = "package"
    """Nobody: on a device it always has the package's default."""


def above(low: float) -> Check:
    """Accept finite numbers above ``low``."""
    return Check(lambda value: value > low and math.isfinite(value), f"a number above {low}")


def at_least(low: float) -> Check:
    """Accept finite numbers from ``low``."""
    return Check(lambda value: value >= low and math.isfinite(value), f"a number >= {low}")


def between(low: float, high: float) -> Check:
    """Accept numbers from ``low`` to ``high``, both included."""
    return Check(lambda value: low <= value <= high, f"a number from {low:,} to {high:,}")


def between_or_inf(low: float, high: float) -> Check:
    """Accept numbers from ``low`` to ``high``, both included, and infinity."""
    return Check(
        lambda value: low <= value <= high or value == math.inf,
        f"a number from {low:,} to {high:,}, or inf",
    )


def choice(*names: str) -> Check:
    """Accept one of a few texts."""
    return Check(lambda value: value in names, "one of " + ", ".join(map(repr, names)), names)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (
        re.error,
        OverflowError,
        RecursionError,
    ):  # The last two: a number or nesting too large.
        return False
    return True


def is_quick_pattern(text: str) -> bool:
    """Tell whether a regular expression can be matched in a short time against any name.

    Python's matcher tries one way after another, and what is optional, alternative or repeated
    multiplies their number. So this counts them, and refuses a repetition inside a repetition.
    """
    if len(text) > _LONGEST_PATTERN or not _is_pattern(text):
        return False
    return _ways(parser.parse(text)) <= _MOST_WAYS


def _ways(tree: Any) -> float:
    """Bound the number of ways in which a parsed pattern can be tried at one place of a name."""
    return math.prod(_ways_of(code, argument) for code, argument in tree)


def _ways_of(code: Any, argument: Any) -> float:
    if code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
        return math.inf
    if code is codes.BRANCH:
        return sum(_ways(branch) for branch in argument[1])
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        least, most, repeated = argument
        lengths = max(1, min(most, _LONGEST_NAME) - least + 1)
        single = len(repeated) == 1 and repeated[0][0] in (
            codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY,
        )  # fmt: skip
        if single:
            return float(lengths)
        return math.inf if most > 1 else lengths - 1 + _ways(repeated)
    # A group, or a look ahead or behind: the pattern in it is the last that it holds.
    inner = argument[-1] if isinstance(argument, tuple) else argument
    return _ways(inner) if isinstance(inner, parser.SubPattern) else 1.0


ANY = Check(lambda _: True, "anything")
FLAG = Check(lambda _: True, "true or false")
PRINTABLE = Check(lambda text: text.isprintable(), "a text of printable characters")
PATTERN = Check(_is_pattern, "a regular expression")
QUICK_PATTERN = Check(
    is_quick_pattern,
    f"a regular expression of at most {_LONGEST_PATTERN} characters, in which at most 3 single "
    "characters or sets repeat without a bound, little else is optional, and no group repeats",
)
BUDGET = Check(lambda value: value > 0, "a number above 0, or inf")


def key(
    default: Value,
    check: Check,
    about: str,
    decides: Decider,
    why: str,
    *,
    on_device: Value | None = None,
    device_check: Check | None = None,
) -> Any:
    """Declare a key as a field of a dataclass.

    Parameters
    ----------
    default : bool, int, float or str
        Its default; its type is the key's type.
    check : Check
        Which values of that type are allowed, and the words for it.
    about : str
        What the key is for.
    decides : Decider
        Who decides its value on a device.
    why : str
        One sentence of reason for ``decides``.
    on_device : bool, int, float or str, optional
        The default on a device, where it is another one.
    device_check : Check, optional
        Which values a device accepts of a run, where they are fewer than ``check`` allows.
    """
    default_there = default if on_device is None else on_device
    return field(
        default=default,
        metadata={
            "check": check, "about": about, "decides": decides, "why": why,
            "on_device": default_there, "device_check": device_check or check,
        },
    )  # fmt: skip


def dashed(name: str) -> str:
    """Return the key of a field's name."""
    return name.replace("_", "-")


def fields_by_key(config: Any) -> dict[str, Field[Any]]:
    """Return the keys that a dataclass declares, each with its field."""
    return {dashed(entry.name): entry for entry in fields(config) if "check" in entry.metadata}


def allowed_values(entry: Field[Any], which: str = "device_check") -> str:
    """Say in words which values a key takes; ``which`` as of `check_value`."""
    check: Check = entry.metadata[which]
    return type_words(entry) if check is ANY else check.words


def type_words(entry: Field[Any]) -> str:
    """Say in words of which type a key's value is."""
    return _TYPES[type(entry.default)]


def widen(entry: Field[Any], value: Any) -> Any:
    """Turn a whole number into a float where the key is one, and the number is that of a float."""
    if type(entry.default) is float and type(value) is int:
        with suppress(OverflowError):
            return float(value)
    return value


def check_value(entry: Field[Any], value: Any, which: str = "check") -> None:
    """Refuse a value of another type, or out of range.

    Parameters
    ----------
    entry : Field
        The key.
    value : object
        What was given.
    which : str
        ``"check"``, or ``"device_check"`` for a value that a run gives to a device.

    Raises
    ------
    InvalidValue
        It cannot be used; names key, value and what is allowed.
    """
    check: Check = entry.metadata[which]
    if type(value) is not type(entry.default):
        kind = type_words(entry)
        if type(entry.default) is float and type(value) is int:
            kind = "a number of at most 308 digits"
        raise InvalidValue(dashed(entry.name), value, kind)
    if not check.holds(value):
        near = near_names(value, check.names) if isinstance(value, str) else ()
        raise InvalidValue(dashed(entry.name), value, check.words, near)
