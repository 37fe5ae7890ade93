"""Rows of a comparison: strategies, each with settings of its own, and their names."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlora_flwr.config import RunConfig, Value, parse_overrides
from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.methods import OWN_KEY
from fedlora_flwr.config.names import by_short_name
from fedlora_flwr.config.sections import (
    ASLoRASection,
    FederationSection,
    LoRASection,
    TrainingSection,
)
from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.strategies import strategy_class

RATES = ("lr-a", "lr-b", "lr-head")
"""The keys that are tuned unless a row sets them."""
_SHARED = (
    *("strategy", "num-clients", "min-clients", "num-rounds", "fraction-train"),
    *("min-completion", "round-timeout"),
)
ROW_KEYS = (
    *(key for key in fields_by_key(FederationSection) if key not in _SHARED),
    *fields_by_key(ASLoRASection),
    *fields_by_key(LoRASection),
    *fields_by_key(TrainingSection),
    *("clip-norm", "clip-weight-a", "clip-weight-b", "clip-weight-head"),
    *("max-rounds", "split-qkv"),
)
"""Keys that a row may set: how a method trains. Data, clients, rounds and budget are shared."""
_OPTION = "--row"
_SPEAKING = ("filter", "optimizer")  # Their values can be understood without the key.


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Parameters
    ----------
    name : str
        The row's name in the table, e.g. ``"la-lora, binomial"``.
    strategy : str
        Name of the strategy.
    settings : Mapping[str, Value]
        Keys of `ROW_KEYS` that the row sets instead of the shared values.
    """

    name: str
    strategy: str
    settings: Mapping[str, Value] = field(default_factory=dict)

    def of(self, shared: RunConfig) -> RunConfig:
        """Return the shared configuration with this row's strategy and settings.

        Raises
        ------
        InvalidValue
            A setting cannot be used; the text names the row.
        """
        try:
            return RunConfig.of(
                replace(shared, own=_own_of(self.strategy, shared)).items(),
                {"strategy": self.strategy},
                self.settings,
            )
        except InvalidValue as error:
            expected = f"{error.allowed} (row {self.name!r})"
            raise InvalidValue(error.key, error.value, expected, error.near) from error


def read_methods(rows: Iterable[str], shared: RunConfig) -> tuple[Method, ...]:
    """Read rows such as ``la-lora filter=binomial lr-b=0.2``, each once.

    A row's name has its strategy and its settings, and also its values of the keys that another row
    of the same strategy sets: beside ``la-lora filter=binomial``, ``la-lora`` is
    ``la-lora, no filter``. A rate that is tuned is left out.

    Parameters
    ----------
    rows : Iterable[str]
        A strategy, then ``key=value`` words; quotes as in a shell.
    shared : RunConfig
        The configuration that all rows share.

    Raises
    ------
    InvalidValue
        A row names no strategy, or sets a shared key or an unusable value.
    """
    read = [_read(text) for text in rows]
    found: dict[str, Method] = {}
    for row in read:
        values = row.of(shared).items()
        same = [other for other in read if other.strategy == row.strategy]
        told = dict.fromkeys(
            key
            for other in same
            for key in other.settings
            if key in row.settings or key not in RATES
        )
        name = ", ".join([row.strategy, *(_word(key, values.get(key, "")) for key in told)])
        # The configuration's values, by which 1 and 1.0 are the same row.
        settings = {key: values[key] for key in row.settings}
        found[name] = Method(name, row.strategy, settings)
    return tuple(found.values())


def _read(text: str) -> Method:
    """Read one row; its name is its text."""
    try:
        strategy, *pairs = shlex.split(text) or [""]
    except ValueError as error:
        raise InvalidValue(_OPTION, text, f"a strategy and key=value words ({error})") from error
    strategy_class(strategy)
    settings = by_short_name(parse_overrides(pairs))
    known = fields_by_key(RunConfig)
    for key in settings:
        if OWN_KEY.fullmatch(key):  # The row's strategy checks its own keys later.
            continue
        if key not in known:
            raise unknown("configuration key", key, ROW_KEYS)
        if key not in ROW_KEYS:
            raise unknown(_OPTION, key, ROW_KEYS, before="a key that rows may differ in, ")
    return Method(text, strategy, settings)


def _own_of(strategy: str, shared: RunConfig) -> tuple[tuple[str, Value], ...]:
    """Return the shared configuration's settings from the table of a row's strategy."""
    if not shared.own:
        return ()
    table = strategy_class(strategy).name
    return tuple((key, value) for key, value in shared.own if key.partition(".")[0] == table)


def _word(key: str, value: Value) -> str:
    """Name a setting in a few words."""
    if isinstance(value, bool):
        return key if value else f"no {key}"
    if value == "none":
        return f"no {key}"
    if value == "":
        return f"default {key}"
    return f"{value}" if key in _SPEAKING else f"{key} {str(value).removesuffix('.0')}"


def settings_of(methods: Sequence[Method]) -> dict[str, dict[str, Value]]:
    """Return every row's strategy and settings by its name, as ``settings.json`` holds them."""
    return {method.name: {"strategy": method.strategy, **method.settings} for method in methods}
