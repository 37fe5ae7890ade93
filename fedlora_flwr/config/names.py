"""Full names of keys (``privacy.epsilon``), short names (``epsilon``), and tables of sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedlora_flwr.config.keys import dashed
from fedlora_flwr.config.sections import SECTION_OF, SECTIONS
from fedlora_flwr.errors import InvalidValue, unknown


def full_name(key: str) -> str:
    """Return a key with its section, e.g. ``privacy.epsilon``; other keys are unchanged."""
    return f"{SECTION_OF[key]}.{key}" if key in SECTION_OF else key


def short_name(key: str) -> str:
    """Return a key without its section; a key outside the package's sections is unchanged.

    Raises
    ------
    InvalidValue
        The section has no such key. If another section has it, the error gives its full name.
    """
    section, dot, short = key.partition(".")
    if not dot or section not in SECTIONS:
        return key
    if (found := SECTION_OF.get(short)) is None:
        keys = [name for name in SECTION_OF if SECTION_OF[name] == section]
        raise unknown("configuration key", key, [f"{section}.{name}" for name in keys])
    if found != section:
        raise InvalidValue("configuration key", key, repr(full_name(short)), (full_name(short),))
    return short


def given_key(name: str) -> str:
    """Return the key that an argument in Python names: underscores stand for dashes.

    A name with a dot is a full name, and is unchanged.
    """
    return name if "." in name else dashed(name)


def key_named(name: str) -> str:
    """Return the short name of the key that an argument in Python names.

    Raises
    ------
    InvalidValue
        See `short_name`.
    """
    return short_name(given_key(name))


def by_short_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by short name, however their keys are written.

    Parameters
    ----------
    values : Mapping[str, Any]
        Tables of sections, full names and short names, in any mixture.

    Raises
    ------
    InvalidValue
        A section has no such key, or one key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in _flattened(values):
        short = short_name(key)
        if short in found:
            raise InvalidValue(full_name(short), value, "one value, but it is given twice")
        found[short] = value
    return found


def by_section(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return names by section, in the order of sections; settings of methods by their table."""
    found: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for key in keys:
        section, _, name = full_name(key).partition(".")
        found.setdefault(section, []).append(name)
    return {section: names for section, names in found.items() if names}


def _flattened(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values; a key in a table gets the table's name and a dot in front."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value
