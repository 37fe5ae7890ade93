"""What a key of the run configuration is: its type, its range, and who decides it on a device.

A device trains for servers that it does not trust. So each key says who decides its value there,
and `fedlora_flwr.config.device_config` reads every value by that word. A key cannot be written
without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import Field, field, fields
from enum import StrEnum
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

from fedlora_flwr.errors import InvalidValue

Value: TypeAlias = bool | int | float | str
Check: TypeAlias = tuple[Callable[[Any], bool], str]

_LONGEST_PATTERN = 500  # characters
_REPEATS = 3  # of unbounded length, in a pattern that a server may send
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


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
    return lambda value: value > low and math.isfinite(value), f"a number above {low}"


def at_least(low: float) -> Check:
    """Accept finite numbers from ``low``."""
    return lambda value: value >= low and math.isfinite(value), f"a number >= {low}"


def between(low: float, high: float) -> Check:
    """Accept numbers from ``low`` to ``high``, both included."""
    return lambda value: low <= value <= high, f"a number from {low:,} to {high:,}"


def choice(*names: str) -> Check:
    """Accept one of a few texts."""
    return lambda value: value in names, "one of " + ", ".join(map(repr, names))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def is_quick_pattern(text: str) -> bool:
    """Tell whether a regular expression can be matched in a short time against any name.

    A repetition inside a repetition can take a time that grows exponentially with the name. So only
    single characters and sets may repeat without a bound, and only a few of them.
    """
    if len(text) > _LONGEST_PATTERN or not _is_pattern(text):
        return False
    repeats = 0
    for code, argument in _codes(parser.parse(text)):
        if code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            return False
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            _, most, repeated = argument
            single = len(repeated) == 1 and repeated[0][0] in (
                codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY,
            )  # fmt: skip
            repeats += most > 1 and not single and 100
            repeats += most > _LONGEST_PATTERN
    return repeats <= _REPEATS


def _codes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the operations of a parsed pattern, nested ones too."""
    for code, argument in tree:
        yield code, argument
        parts = argument if isinstance(argument, tuple | list) else [argument]
        for part in parts:
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, parser.SubPattern):
                    yield from _codes(inner)


ANY: Check = (lambda _: True, "anything")
FLAG: Check = (lambda _: True, "true or false")
PATTERN: Check = (_is_pattern, "a regular expression")
QUICK_PATTERN: Check = (
    is_quick_pattern,
    f"a regular expression of at most {_LONGEST_PATTERN} characters, in which at most {_REPEATS} "
    "single characters or sets repeat without a bound, and no group repeats",
)
BUDGET: Check = (lambda value: value > 0, "a number above 0, or inf")


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
    """Return a dataclass's fields by key."""
    return {dashed(entry.name): entry for entry in fields(config)}


def allowed_values(entry: Field[Any]) -> str:
    """Say in words which values a device accepts for a key."""
    text: str = entry.metadata["device_check"][1]
    return _TYPES[type(entry.default)] if text == ANY[1] else text


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
    check, allowed = entry.metadata[which]
    if type(value) is not type(entry.default):
        kind = _TYPES[type(entry.default)]
        if type(entry.default) is float and type(value) is int:
            kind = "a number of at most 308 digits"
        raise InvalidValue(dashed(entry.name), value, kind)
    if not check(value):
        raise InvalidValue(dashed(entry.name), value, allowed)
