"""Checks of a run's settings against its method: the method's own settings and abilities.

For these checks a method's class is loaded by name, on the server and where a run is started. A
client never loads it, because a strategy is the server's code (see `RunConfig.received`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fedlora_flwr.config.keys import Value, check_value, dashed, fields_by_key, widen
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.places import load, strategy_names

if TYPE_CHECKING:
    from fedlora_flwr.config.run_config import RunConfig

OWN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}\.[A-Za-z0-9_-]{1,64}")
"""The form of the key of a method's own setting: its table, a dot, its name."""


class Method(Protocol):
    """The attributes of a strategy's class that the configuration reads."""

    name: str
    settings: type
    personal: bool
    own_models: bool
    stable_basis: bool
    folds: bool
    needs_each_upload: bool
    own_ranks: bool

    def no_server_step(self) -> str:
        """Return the reason why the server's optimizer cannot move the model; empty if it can."""
        ...


def method_of(name: str) -> Method:
    """Load the class of a strategy by name.

    Raises
    ------
    InvalidValue
        There is no such strategy.
    """
    found: Method = load("strategy", "fedlora_flwr.strategies:strategy_class", "function")(name)
    return found


def own_keys(method: Method, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declarations of a method's own settings, by key.

    Parameters
    ----------
    method : Method
        The strategy.
    known : Mapping[str, Field]
        The keys of the run configuration, which are not any method's own settings.
    """
    entries = fields_by_key(method.settings)
    return {f"{method.name}.{k}": e for k, e in entries.items() if known.get(k) is not e}


def settings_of_methods(known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the own settings of all named strategies, by key. This loads every strategy."""
    for name in strategy_names():
        yield from own_keys(method_of(name), known).items()


def checked_own(
    strategy: str, own: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Value]:
    """Check a run's settings of methods, and return them.

    Parameters
    ----------
    strategy : str
        The strategy of the run. ``own`` may hold settings of other installed strategies as well,
        because one recipe may be used with any of them.
    own : Mapping[str, Any]
        Values by key, ``"table.name"``.
    known : Mapping[str, Field]
        The keys of the run configuration itself.

    Raises
    ------
    InvalidValue
        No method has such a setting, or its value is of another type or out of range.
    """
    found: dict[str, Value] = {}
    chosen = method_of(strategy)
    for key, value in own.items():
        table = key.partition(".")[0]
        method = chosen
        if table != chosen.name:
            if table not in strategy_names():
                raise _unknown_table(key, chosen, known)
            method = method_of(table)
        entries = own_keys(method, known)
        if key not in entries:
            raise _unknown_setting(key, table, entries, known)
        entry = entries[key]
        try:
            check_value(entry, widened := widen(entry, value))
        except InvalidValue as error:
            raise InvalidValue(key, error.value, error.allowed, error.near) from error
        found[key] = widened
    return found


def check_method(config: RunConfig) -> None:
    """Refuse settings that the configured method cannot work with.

    Raises
    ------
    InvalidValue
        There is such a setting. The error names it and the allowed values.
    """
    if config.quantization != "none" and method_of(config.strategy).folds:
        raise InvalidValue(
            "quantization",
            config.quantization,
            f"'none' where strategy = {config.strategy!r}, which changes the frozen weights",
        )
    if config.average_decay and (reason := _no_average(method_of(config.strategy))):
        raise InvalidValue(
            "average-decay",
            config.average_decay,
            f"0 where strategy = {config.strategy!r}: {reason}",
        )
    chosen = config.server_optimizer
    if chosen != "none" and (reason := method_of(config.strategy).no_server_step()):
        allowed = f"'none' where strategy = {config.strategy!r}: {reason}"
        raise InvalidValue("server-optimizer", chosen, allowed)
    if (key := config.asks_server_to_measure) and method_of(config.strategy).personal:
        allowed = f"no value with strategy = {config.strategy!r}: {PERSONAL}"
        raise InvalidValue(key, config.items()[key], allowed)
    if config.secure_sum and (reason := _no_sum(method_of(config.strategy))):
        allowed = (
            f"a method that needs only a sum, as trust-model = {config.trust_model!r}: {reason}"
        )
        raise InvalidValue("strategy", config.strategy, allowed)
    if config.robust in _RULES and (reason := _no_rule(config)):
        raise InvalidValue("robust", config.robust, f"'auto', 'norm-bound' or 'none': {reason}")
    if config.client_ranks and not method_of(config.strategy).own_ranks:
        raise InvalidValue("client-ranks", config.client_ranks, "empty, or strategy = 'flexlora'")


def _no_sum(method: Method) -> str:
    """Return the reason why the method cannot use the sum of all uploads; empty if it can."""
    if method.personal:
        return "this method leaves a factor or a model with each client"
    if method.needs_each_upload:
        return "this method needs each upload"
    return ""


def _no_rule(config: RunConfig) -> str:
    """Return the reason why a robust rule cannot replace the mean; empty if it can."""
    if method_of(config.strategy).needs_each_upload:
        return f"strategy = {config.strategy!r} needs each upload and averages none"
    return ""


_RULES = ("trimmed-mean", "median", "krum")
PERSONAL = "models stay with the clients and are evaluated there"


def _no_average(method: Method) -> str:
    """Return the reason why models of several rounds cannot be averaged; empty if they can."""
    if method.personal:
        return PERSONAL
    if method.folds:
        return "part of each round's model is folded into frozen weights and has no mean"
    if not method.stable_basis:
        return "factors of two rounds are in different bases and have no mean"
    return ""


def _unknown_table(key: str, chosen: Method, known: Mapping[str, Any]) -> InvalidValue:
    tables = {chosen.name} if own_keys(chosen, known) else set()
    names = {*known, *own_keys(chosen, known), *tables}
    return unknown("configuration key", key, names, listed_by="fedlora keys")


def _unknown_setting(
    key: str, table: str, entries: Mapping[str, Any], known: Mapping[str, Any]
) -> InvalidValue:
    if entries:
        return unknown("configuration key", key, entries)
    name = dashed(key.partition(".")[2])
    if name in known:
        return InvalidValue("configuration key", key, repr(name), (name,))
    return InvalidValue("configuration key", key, f"none: {table} has no settings of its own")
