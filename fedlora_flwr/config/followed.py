"""Keys that a command takes with a recipe and does not follow, because its runs are not the run.

The rule is the same for all commands: such a key is refused where it is given for the command
itself, and where the recipe has it, it is left out and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.config.names import key_named
from fedlora_flwr.config.run_config import RunConfig
from fedlora_flwr.errors import InvalidValue

AUDIT, COMPARISON, PLAN, SAVED = "an audit", "a comparison", "a plan", "a saved adapter"
_NO_FOLDER = "its runs keep no folder"
_NOT_MEASURED = "its runs are not measured"
NOT_FOLLOWED: Mapping[str, Mapping[str, str]] = {
    AUDIT: {
        "trackers": _NO_FOLDER,
        "run-dir": _NO_FOLDER,
        "state-dir": "its runs have ledgers of their own",
        "resume": "its runs begin at their first round",
        "start": "its runs begin from fresh adapters",
        "lora-init": "its runs begin from fresh adapters",
        "average-decay": "the attacker sees each round's own model",
        "client-ranks": "all its clients have the same rank",
        "eval-every": _NOT_MEASURED,
        "early-stopping-patience": _NOT_MEASURED,
        "early-stopping-threshold": _NOT_MEASURED,
        "metric-for-best-model": _NOT_MEASURED,
        "generation-limit": _NOT_MEASURED,
    },
    COMPARISON: {
        "trackers": f"{_NO_FOLDER}, and rows.csv has them all",
        "run-dir": f"{_NO_FOLDER}, and rows.csv has them all",
        "state-dir": "each of its runs has a ledger of its own",
        "ledger-scope": "each of its runs has a ledger of its own",
        "resume": "the same command continues a comparison",
    },
    PLAN: {
        "early-stopping-patience": "it counts all rounds",
        "early-stopping-threshold": "it counts all rounds",
        "average-decay": "its noise is that of a single round",
        "client-ranks": "it counts the largest rank for each client",
        "resume": "it counts a run from its first round",
    },
}
"""For each command, the keys that it does not follow, each with the reason."""


def followed(
    command: str, config: RunConfig, given: Iterable[str] = ()
) -> tuple[RunConfig, list[str]]:
    """Return what a command follows of a configuration, and a sentence on each key that it leaves.

    Parameters
    ----------
    command : str
        A name of `NOT_FOLLOWED`.
    config : RunConfig
        The recipe, and what was given with it.
    given : Iterable[str] (default: none)
        The keys that were given for the command itself, in any form.

    Returns
    -------
    tuple[RunConfig, list[str]]
        The configuration, in which those keys have their defaults; and the sentences.

    Raises
    ------
    InvalidValue
        Such a key was given for the command itself.

    Examples
    --------
    >>> followed(AUDIT, RunConfig(trackers="wandb"))[1]
    ["trackers = 'wandb' is not followed by an audit: its runs keep no folder"]
    """
    named, entries = set(map(key_named, given)), fields_by_key(RunConfig)
    left: dict[str, Any] = {}
    said = []
    for key, why in NOT_FOLLOWED[command].items():
        value, default = config.items()[key], entries[key].default
        if value == default:
            continue
        if key in named:
            allowed = f"{default!r}, because {command} does not follow this key: {why}"
            raise InvalidValue(key, value, allowed)
        left[key] = default
        said.append(f"{key} = {value!r} is not followed by {command}: {why}")
    return (RunConfig.of(config.items(), left) if left else config), said


def check_known(command: str, known: Iterable[str], given: Mapping[str, Any]) -> None:
    """Refuse keys that were given for a command and that it does not read.

    Parameters
    ----------
    command : str
        What reads the keys, for the error.
    known : Iterable[str]
        The keys that are read.
    given : Mapping[str, Any]
        The values that were given, by key in any form.

    Raises
    ------
    InvalidValue
        There is such a key.
    """
    read = set(known)
    for name, value in given.items():
        if (key := key_named(name)) not in read:
            allowed = f"no value here, because {command} does not follow this key. It follows "
            raise InvalidValue(key, value, allowed + ", ".join(sorted(read)))
