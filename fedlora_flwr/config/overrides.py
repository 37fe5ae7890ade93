"""``key=value`` as a person types it; the type of the key decides how the value is read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import short_name
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.errors import InvalidValue

_KEYS = fields_by_key(RunConfig)
_WHOLE = re.compile(r"[+-]?\d+(_\d+)*")


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs as typed on a command line.

    A number may be written in any usual way: ``.5``, ``5.``, ``+3``, ``1_000``, ``1e-3``, ``inf``.
    A text needs no quotes, even if it looks like a number. A value that cannot be read as the key's
    type is returned as TOML reads it, or as a text, and `RunConfig` then refuses it.

    Raises
    ------
    InvalidValue
        A pair has no ``=``, or names a section that does not have the key.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = (part.strip() for part in pair.partition("="))
        if not separator:
            raise InvalidValue("-c", pair, "key=value")
        found[key] = _read(key, text)
    return found


def _read(name: str, text: str) -> Any:
    key = short_name(name)
    if key not in _KEYS:  # A method's own setting, or an unknown key.
        return _number(text)
    kind = type(_KEYS[key].default)
    if kind in (int, float):
        number = _number(text)
        # For a whole-number key, 1e3 is 1000. The configuration later refuses 2.5.
        return int(number) if kind is int and _is_whole(number) else number
    value = _toml(text)
    return text if kind is str and not isinstance(value, str) else value


def _number(text: str) -> Any:
    """Return a number if the text has one of the usual forms; otherwise what `_toml` returns."""
    # Python refuses integers of thousands of digits. They stay texts: as floats they would become
    # infinite.
    with suppress(ValueError):
        return int(text) if _WHOLE.fullmatch(text) else float(text)
    return text if _WHOLE.fullmatch(text) else _toml(text)


def _is_whole(number: Any) -> bool:
    return isinstance(number, float) and number.is_integer()


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
