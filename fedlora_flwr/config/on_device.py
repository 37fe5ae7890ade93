"""A run's configuration as it is on a device: each key has the value of the one who decides it.

A device trains for a server that may send anything. What the device decides is read from its own
file alone, and has the package's default where the file is silent. What the run decides is checked
here, before a model is built or a record is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any

from fedlora_flwr.config.keys import Decider, check_value, fields_by_key, widen
from fedlora_flwr.config.methods import OWN_KEY
from fedlora_flwr.config.names import by_short_name
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.errors import InvalidValue, OrderRefused, refusing, unknown

_KEYS = fields_by_key(RunConfig)
_OF_THE_RUN = (Decider.RUN, Decider.LIMITED)
_AGREED = ("task", "trust-model", "colluding")
_LONGEST = 10_000  # characters of a text that a run sends
_MOST_OWN = 1_000  # settings of methods that a run sends
UNREAD = f"a number, true, false, or a text of at most {_LONGEST:,} characters"
"""What a device accepts as a setting of a method, which it does not read."""

OWN = tuple(key for key, entry in _KEYS.items() if entry.metadata["decides"] == Decider.DEVICE)
"""Keys that a device's file may give."""
LIMITED = tuple(key for key, entry in _KEYS.items() if entry.metadata["decides"] == Decider.LIMITED)
"""Keys that a device's file may limit."""


@dataclass(frozen=True)
class Limit:
    """What a device accepts of a run for one key, beyond what the package allows.

    Parameters
    ----------
    key : str
        A key of `LIMITED`.
    least, most : float, optional
        Smallest and largest number.
    choices : tuple, optional
        The only values.
    """

    key: str
    least: float | None = None
    most: float | None = None
    choices: tuple[Any, ...] | None = None

    @classmethod
    def read(cls, key: str, value: Any) -> Limit:
        """Read one entry of the table ``[limits]`` of a device's file.

        Parameters
        ----------
        key : str
            The key that is limited.
        value : float or list
            For a number, the largest, or a list of the smallest and the largest. For a text, a list
            of those that are accepted.

        Raises
        ------
        InvalidValue
            The key cannot be limited, or the value is of another form.
        """
        if key not in LIMITED:
            raise unknown("key of [limits]", key, LIMITED)
        entry = _KEYS[key]
        if type(entry.default) is str:
            allowed = 'a list of accepted values, such as ["fp32"]'
            if not isinstance(value, list) or not value:
                raise InvalidValue(f"limits.{key}", value, allowed)
            for one in value:
                check_value(entry, one)
            return cls(key, choices=tuple(value))
        bounds = value if isinstance(value, list) else [None, value]
        numbers = [bound for bound in bounds if bound is not None]
        good = len(bounds) == 2 and all(type(bound) in (int, float) for bound in numbers)
        if not good or numbers != sorted(numbers):
            allowed = "the largest value, or [smallest, largest]"
            raise InvalidValue(f"limits.{key}", value, allowed)
        return cls(key, *bounds)

    def __str__(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(map(repr, self.choices))
        return " and ".join(
            f"{which} {bound:g}"
            for which, bound in (("at least", self.least), ("at most", self.most))
            if bound is not None
        )

    def check(self, value: Any) -> None:
        """Refuse a value of a run.

        Raises
        ------
        OrderRefused
            The device does not accept it.
        """
        good = (
            (self.choices is None or value in self.choices)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )
        if not good:
            raise OrderRefused(
                f"{self.key} = {value!r} is refused: this device accepts {self}. "
                "Change the run's configuration."
            )


def device_config(
    run: Mapping[str, Any], own: Mapping[str, Any], limits: Mapping[str, Limit] | None = None
) -> RunConfig:
    """Put a run's configuration together as it is on a device.

    Parameters
    ----------
    run : Mapping[str, Any]
        What the server sent. Nothing in it is trusted.
    own : Mapping[str, Any]
        What the device's file gives, keys of `OWN` alone.
    limits : Mapping[str, Limit], optional
        What the device's file accepts of the run's values, by key.

    Raises
    ------
    OrderRefused
        The run has an unknown key, or a value that this package or this device does not accept.
    InvalidValue
        The device's own values cannot be used with it. This text may hold the device's own values,
        so it does not travel.
    """
    values: dict[str, Any] = {}
    own_settings = 0
    for key, value in _by_short_name(run).items():
        if OWN_KEY.fullmatch(key):
            # The server's strategy alone reads these. No code is loaded for them here.
            own_settings += 1
            _check_unread(key, value, own_settings)
        else:
            values[key] = _accepted(key, value)
    for key in _AGREED:
        mine = own.get(key, _KEYS[key].default)
        if key in values and values[key] != mine:
            raise OrderRefused(
                f"{key} = {str(values[key])[:80]!r} is refused: this device's file has another "
                f"value of {key}. Run what its owner agreed to."
            )
    for key, limit in (limits or {}).items():
        limit.check(values.get(key, _KEYS[key].default))
    with refusing():
        # On their own first: what is wrong among the run's own values may be told.
        agreed = {key: own[key] for key in _AGREED if key in own}
        RunConfig.received(_decided(values, agreed))
    return RunConfig.received(_decided(values, own))


def _by_short_name(run: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return by_short_name({str(key): value for key, value in run.items()})
    except InvalidValue as error:
        raise OrderRefused(f"{error} Install the same version on server and devices.") from error


def _decided(run: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Give each key the value of the one who decides it."""
    found = {}
    for key, entry in _KEYS.items():
        decides, default = entry.metadata["decides"], entry.metadata["on_device"]
        source = {Decider.DEVICE: own, Decider.PACKAGE: {}}.get(decides, run)
        found[key] = source.get(key, default)
    return found


def _accepted(key: str, value: Any) -> Any:
    """Return a run's value for a key, or refuse it; values that nobody reads here, too."""
    entry = _KEYS.get(key)
    if entry is None:
        raise OrderRefused(
            f"The run's configuration has the key {key[:80]!r}, which this version of the package "
            "does not know. Install the same version on server and devices."
        )
    if isinstance(value, str) and len(value) > _LONGEST:
        raise OrderRefused(
            f"{key} is a text of {len(value):,} characters, and at most {_LONGEST:,} are accepted."
        )
    with refusing():
        return _checked(entry, value)


def _check_unread(key: str, value: Any, count: int) -> None:
    """Refuse what is not a setting of any method; what it says is the server's alone."""
    if count > _MOST_OWN:
        raise OrderRefused(f"The run has more than {_MOST_OWN:,} settings of methods.")
    text = value if isinstance(value, str) else ""
    if not isinstance(value, bool | int | float | str) or len(text) > _LONGEST:
        raise OrderRefused(f"{key} is refused: a method's setting is {UNREAD}.")


def _checked(entry: Field[Any], value: Any) -> Any:
    value = widen(entry, value)
    of_the_run = entry.metadata["decides"] in _OF_THE_RUN
    check_value(entry, value, "device_check" if of_the_run else "check")
    return value
