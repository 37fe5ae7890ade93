"""Declarations of configuration keys: a key's type, its range, and who decides it on a device.

A device trains for servers that it does not trust. Each key therefore declares who decides its
value on a device (`Decider`), and `fedlora_flwr.config.device_config` obeys this declaration. A key
cannot be declared without it.
"""

from __future__ import annotations

import functools
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
_LONGEST_NAME = 128  # characters of a module's name that an unbounded repetition may match
_MOST_WAYS = 10_000_000  # Ways in which a matcher may try a pattern on one name.
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Check(NamedTuple):
    """The values of a key's type that are allowed.

    Parameters
    ----------
    holds : callable
        Tells whether a value is allowed.
    words : str
        The allowed values, in words.
    names : tuple[str, ...] (default: none)
        The allowed texts, where they can be listed.
    """

    holds: Callable[[Any], bool]
    words: str
    names: tuple[str, ...] = ()


class Decider(StrEnum):
    """Who decides a value on a device. In a simulation the run decides everything."""

    DEVICE = "device"
    """The device's file, or the package's default if the file has no value. Never a server."""
    LIMITED = "run, within the device's limits"
    """The server. The package limits it, and the device's file may limit it further."""
    RUN = "run"
    """The server, within the package's limits."""
    PACKAGE = "package"
    """The package: on a device, the key always has the package's default."""


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
    ):  # The last two: a number that is too large, or too many nested groups.
        return False
    return True


def is_quick_pattern(text: str) -> bool:
    """Tell whether a regular expression can be matched in a short time against any name.

    Python's matcher tries one way of matching after another. Each optional, alternative or repeated
    part multiplies the number of ways. This function bounds that number, and refuses a repetition
    inside a repetition.
    """
    if len(text) > _LONGEST_PATTERN or not _is_pattern(text):
        return False
    return _ways(parser.parse(text)) <= _MOST_WAYS


def _ways(tree: Any) -> float:
    """Bound the number of ways to try a parsed pattern at one position of a name."""
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
    # In a group, a lookahead or a lookbehind, the inner pattern is the last argument.
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
        The default. Its type is the key's type.
    check : Check
        The values of that type that are allowed.
    about : str
        The purpose of the key, for users.
    decides : Decider
        Who decides the value on a device.
    why : str
        The reason for ``decides``, in one sentence.
    on_device : bool, int, float or str, optional
        The default on a device, if it differs from ``default``.
    device_check : Check, optional
        The values that a device accepts from a run, if they are fewer than ``check`` allows.
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
    """Return a field's name with dashes for underscores, as its key is written."""
    return name.replace("_", "-")


def fields_by_key(config: Any) -> dict[str, Field[Any]]:
    """Return the fields that a dataclass declares with `key`, by key."""
    return dict(_declared(config if isinstance(config, type) else type(config)))


@functools.cache
def _declared(config: Any) -> dict[str, Field[Any]]:
    return {dashed(entry.name): entry for entry in fields(config) if "check" in entry.metadata}


def allowed_values(entry: Field[Any], which: str = "device_check") -> str:
    """Return in words the values that a key accepts; ``which`` as for `check_value`."""
    check: Check = entry.metadata[which]
    return type_words(entry) if check is ANY else check.words


def type_words(entry: Field[Any]) -> str:
    """Return in words the type of a key's value."""
    return _TYPES[type(entry.default)]


def widen(entry: Field[Any], value: Any) -> Any:
    """Turn an int into a float where the key's type is float, unless it is too large for one."""
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
        The given value.
    which : str
        ``"check"``, or ``"device_check"`` for a value that a run gives to a device.

    Raises
    ------
    InvalidValue
        The value cannot be used. The error names the key, the value and the allowed values.
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
