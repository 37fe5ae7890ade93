"""Objects that a caller in Python gives instead of names: task, strategy, records and trackers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from fedlora_flwr import places
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.given import as_dataset
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.places import holding, is_held, tracker_names
from fedlora_flwr.strategies.base import FedLoRA

TRAIN, TEST = "train", "test"
_OBJECTS = ("task", "strategy", "dataset")


def given(
    stack: ExitStack,
    *,
    task: Any = None,
    strategy: Any = None,
    train: Any = None,
    test: Any = None,
    trackers: Any = None,
) -> dict[str, Any]:
    """Return the keys that stand for objects, which have names until the stack closes.

    Parameters
    ----------
    stack : ExitStack
        Lets go of the names.
    task, strategy, train, test, trackers
        See `fedlora_flwr.simulate`.

    Raises
    ------
    InvalidValue
        An object is of another kind, or only one of the two tables is given.
    """
    found: dict[str, Any] = {}
    if task is not None:
        found["task"] = task if isinstance(task, str) else stack.enter_context(holding(task))
    if strategy is not None:
        found["strategy"] = _strategy(stack, strategy)
    if train is not None or test is not None:
        if train is None or test is None:
            missing = TRAIN if train is None else TEST
            raise InvalidValue(missing, None, "a table, because the other one is given")
        tables = {TRAIN: as_dataset(train, TRAIN), TEST: as_dataset(test, TEST)}
        found["dataset"] = stack.enter_context(holding(tables, "data"))
        found |= {"train-split": TRAIN, "test-split": TEST, "dataset-subset": ""}
    if trackers is not None:
        found["trackers"] = _trackers(stack, trackers)
    return found


def check_alone(
    config: RunConfig, key: str, value: object, *, alone: bool, serves: bool = True
) -> None:
    """Refuse objects of this process that other processes would need.

    Parameters
    ----------
    config : RunConfig
        The run.
    key, value
        What asks for other processes, for the error.
    alone : bool
        Whether this process does all the work.
    serves : bool (default: True)
        Whether this process is the server, which alone has trackers.

    Raises
    ------
    InvalidValue
        An object would have to travel.
    """
    held = [name for name in _OBJECTS if is_held(str(config.items()[name]))]
    objects = [] if alone else held
    if not serves:
        objects += ["tracker" for name in tracker_names(config.trackers) if is_held(name)][:1]
    if objects:
        named = f"{' and '.join(objects)} {'was' if len(objects) == 1 else 'were'}"
        allowed = (
            f"this process alone (workers = 1), because {named} given as an object, and an object "
            "cannot travel to another process. Put it in a module and name it module:name, or "
            "save the records as a file"
        )
        raise InvalidValue(key, value, allowed)


def _trackers(stack: ExitStack, trackers: str | Iterable[Any]) -> str:
    """Return the names of trackers, with commas between them."""
    every = [trackers] if isinstance(trackers, str) else list(trackers)
    return ",".join(t if isinstance(t, str) else stack.enter_context(holding(t)) for t in every)


def _strategy(stack: ExitStack, strategy: Any) -> str:
    """Return the name of a strategy; a class that can be imported keeps its place as a name."""
    if isinstance(strategy, str):
        return strategy
    if not (isinstance(strategy, type) and issubclass(strategy, FedLoRA)):
        kind = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
        allowed = (
            "a name, or a subclass of FedLoRA itself, such as RoLoRA. The run makes the object; "
            "its settings are keys, such as fraction_train = 0.5"
        )
        raise InvalidValue("strategy", kind, allowed)
    place = f"{strategy.__module__}:{strategy.__qualname__}"
    for name, known in places.STRATEGIES.items():
        if known == place:
            return name
    module = sys.modules.get(strategy.__module__)
    there = getattr(module, strategy.__name__, None)
    # Another process has a main module of its own.
    if there is strategy and strategy.__module__ != "__main__" and places.is_place(place):
        return place
    return stack.enter_context(holding(strategy))
