"""A run's configuration on a device: for each key, the party that decides it gives the value.

A device trains for a server that may send anything. Keys that the device decides are read from its
own file only, or have the package's default if the file has no value. Values that the run decides
are checked here, before a model is built or a record is opened.
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
_AGREED = ("task", "trust-model", "colluding", "unit")
_LONGEST = 10_000  # characters of a text that a run sends
_MOST_OWN = 1_000  # settings of methods that a run sends
UNREAD = f"a number, true, false, or a text of at most {_LONGEST:,} characters"
"""The values that a device accepts for a method's setting, which it does not use."""

OWN = tuple(key for key, entry in _KEYS.items() if entry.metadata["decides"] == Decider.DEVICE)
"""Keys that a device's file may give."""
LIMITED = tuple(key for key, entry in _KEYS.items() if entry.metadata["decides"] == Decider.LIMITED)
"""Keys that a device's file may limit."""


@dataclass(frozen=True)
class Limit:
    """A device's own limit for one key of a run, stricter than the package's limit.

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
            For a number: the largest accepted value, or a list of the smallest and the largest. For
            a text: a list of the accepted texts.

        Raises
        ------
        InvalidValue
            The key cannot be limited, or the value has another form.
        """
        if key not in LIMITED:
            raise unknown("key of [limits]", key, LIMITED)
        entry = _KEYS[key]
        if type(entry.default) is str:
            allowed = 'a list of accepted values, such as ["fp32"]'
            if not isinstance(value, list) or not value:
                raise InvalidValue(f"limits.{key}", value, allowed)
            for one in value:
                check_value(entry, one, "device_check")
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
    """Combine a run's values and a device's own values into the configuration on this device.

    Parameters
    ----------
    run : Mapping[str, Any]
        The values that the server sent. None of them is trusted.
    own : Mapping[str, Any]
        The values in the device's file, for keys of `OWN` only.
    limits : Mapping[str, Limit], optional
        The limits in the device's file for values of the run, by key.

    Raises
    ------
    OrderRefused
        The run has an unknown key, or a value that this package or this device does not accept.
    InvalidValue
        The device's own values contradict the run's. The text may hold the device's own values, so
        it is not sent to the server.
    """
    values: dict[str, Any] = {}
    own_settings = 0
    for key, value in _by_short_name(run).items():
        if OWN_KEY.fullmatch(key):
            # Only the server's strategy reads these settings, so no code is loaded to check them.
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
        # The run's values are first checked without the device's own values (but for _AGREED), so
        # that an error in them may be reported to the server.
        agreed = {key: own[key] for key in _AGREED if key in own}
        RunConfig.received(_decided(values, agreed))
    return RunConfig.received(_decided(values, own))


def _by_short_name(run: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return by_short_name({str(key): value for key, value in run.items()})
    except InvalidValue as error:
        raise OrderRefused(f"{error} Install the same version on server and devices.") from error


def _decided(run: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Take each key's value from the party that decides it, or else its default on a device."""
    found = {}
    for key, entry in _KEYS.items():
        decides, default = entry.metadata["decides"], entry.metadata["on_device"]
        source = {Decider.DEVICE: own, Decider.PACKAGE: {}}.get(decides, run)
        found[key] = source.get(key, default)
    return found


def _accepted(key: str, value: Any) -> Any:
    """Return a run's value for a key, or refuse it. Values that a device ignores are checked too.

    Raises
    ------
    OrderRefused
        The key is unknown, or the value is not accepted.
    """
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
    """Refuse a value of a type or size that no method's setting has; its meaning is not checked."""
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
