"""The code behind a name: built-in names, names of installed packages, and ``module:name``.

Code is loaded only when its name is used. Basic modules can therefore use strategies and tasks
without an import of higher-level modules, and code that is not used is not loaded. An object that
only this process has gets a name of the same form for as long as it is needed (`holding`).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from fedlora_flwr.errors import InvalidValue, unknown

STRATEGY_GROUP = "fedlora_flwr.strategies"
"""The entry-point group in which an installed package registers its strategies."""

STRATEGIES: Mapping[str, str] = {
    "dp-lora": "fedlora_flwr.strategies.dp_lora:DPLoRA",
    "ffa-lora": "fedlora_flwr.strategies.ffa_lora:FFALoRA",
    "ffa-seeds": "fedlora_flwr.strategies.ffa_seeds:FFASeeds",
    "rolora": "fedlora_flwr.strategies.rolora:RoLoRA",
    "la-lora": "fedlora_flwr.strategies.la_lora:LALoRA",
    "as-lora": "fedlora_flwr.strategies.as_lora:ASLoRA",
    "fedsvd": "fedlora_flwr.strategies.fedsvd:FedSVD",
    "flexlora": "fedlora_flwr.strategies.flexlora:FlexLoRA",
    "flora": "fedlora_flwr.strategies.flora:FLoRA",
    "fedex-lora": "fedlora_flwr.strategies.fedex_lora:FedExLoRA",
    "fedsa-lora": "fedlora_flwr.strategies.fedsa_lora:FedSALoRA",
    "mr-mtl": "fedlora_flwr.strategies.mr_mtl:MRMTL",
    "head-only": "fedlora_flwr.strategies.head_only:HeadOnly",
}

FLOWERS: Mapping[str, str] = {
    name: f"fedlora_flwr.strategies.flowers:{kind}"
    for name, kind in {
        "fedavg": "FedAvg",
        "fedprox": "FedProx",
        "fedavgm": "FedAvgM",
        "fedadagrad": "FedAdagrad",
        "fedadam": "FedAdam",
        "fedyogi": "FedYogi",
    }.items()
}
"""Flower's own strategies, for comparison."""


TRACKERS: Mapping[str, str] = {
    "tensorboard": "fedlora_flwr.tracking.tensorboard:TensorBoard",
    "mlflow": "fedlora_flwr.tracking.mlflow:MLflow",
    "wandb": "fedlora_flwr.tracking.wandb:WandB",
}
"""Programs that record a run's figures. The name is also that of the extra that each needs."""


class KnownTask(NamedTuple):
    """Facts about a task that are known before its code is loaded.

    Parameters
    ----------
    place : str
        The task's class, as ``module:Class``.
    about : str
        The model and the columns that the task needs, and the figure that it reports.
    extras : tuple[str, ...]
        The extras that must be installed (see `fedlora_flwr.errors.require`).
    on_device : tuple[tuple[str, ...], ...]
        Groups of keys. A device's own file must give at least one key of each group (see
        `fedlora_flwr.tasks.registry.required_on_device`).
    """

    place: str
    about: str
    extras: tuple[str, ...]
    on_device: tuple[tuple[str, ...], ...] = ()


_DATA = (("model",), ("dataset",))
_CLASSES = ("class-names", "num-classes")
TASKS: Mapping[str, KnownTask] = {
    "digits": KnownTask(
        "fedlora_flwr.tasks.digits:DigitsTask",
        "a tiny vision transformer and pictures, both built in; accuracy",
        ("client", "vision"),
    ),
    "image-classification": KnownTask(
        "fedlora_flwr.tasks.image_classification:ImageClassification",
        "any timm model; a picture and a class; accuracy",
        ("client", "vision"),
        (*_DATA, _CLASSES),
    ),
    "instruction-tuning": KnownTask(
        "fedlora_flwr.tasks.instruction_tuning:InstructionTuning",
        "any causal language model whose tokenizer has a chat template; messages, or prompt and "
        "response; token accuracy and perplexity",
        ("client", "text"),
        _DATA,
    ),
    "question-answering": KnownTask(
        "fedlora_flwr.tasks.question_answering:QuestionAnswering",
        "any transformers model with an extractive QA head; SQuAD's question, context and answers; "
        "F1 and exact match",
        ("client", "text"),
        _DATA,
    ),
    "text-classification": KnownTask(
        "fedlora_flwr.tasks.text_classification:TextClassification",
        "any transformers encoder or decoder; one text or two, and a class; accuracy",
        ("client", "text"),
        (*_DATA, _CLASSES),
    ),
}

_PLACE = re.compile(r"[^:.\s][^:\s]*:\w+")
_HERE = "this-process"
_held: dict[str, Any] = {}
_numbers = count(1)


def is_place(name: str) -> bool:
    """Tell whether a name has the form ``module:name``."""
    return bool(_PLACE.fullmatch(name))


@contextmanager
def holding(thing: object, kind: str = "") -> Iterator[str]:
    """Give an object of this process a name that a configuration can hold, until the block ends.

    Parameters
    ----------
    thing : object
        A task, a strategy's class or a data set.
    kind : str (default: the name of its type)
        The first part of the name.
    """
    kind = kind or getattr(thing, "__name__", type(thing).__name__)
    name = f"{_HERE}:{re.sub(r'[^0-9A-Za-z_]', '_', kind)}_{next(_numbers)}"
    _held[name] = thing
    try:
        yield name
    finally:
        del _held[name]


def is_held(name: str) -> bool:
    """Tell whether a name stands, or stood, for an object of one process."""
    return name.partition(":")[0] == _HERE


def held(key: str, name: str) -> Any:
    """Return the object behind a name that `holding` gave.

    Raises
    ------
    InvalidValue
        The object is in another process, or was given to a function that has ended.
    """
    if name not in _held:
        raise InvalidValue(
            key,
            name,
            "an object that this process has. It was given as an object to a function in Python, "
            "which a file or another process cannot hold. Give the object again",
        )
    return _held[name]


def strategy_names() -> tuple[str, ...]:
    """Return the names of built-in strategies, of Flower's, and of those of installed packages."""
    return tuple(dict.fromkeys((*STRATEGIES, *FLOWERS, *sorted(_registered()))))


def check_task_name(name: str) -> None:
    """Refuse a name that is neither a task of this package nor of the form ``module:name``.

    Raises
    ------
    InvalidValue
        No task has that name.
    """
    if name not in TASKS and not is_place(name):
        raise unknown("task", name, TASKS, after=", or your own module:function")


def check_strategy_name(name: str) -> None:
    """Refuse a name that is neither a known strategy nor of the form ``module:name``.

    Raises
    ------
    InvalidValue
        No strategy has that name.
    """
    # What is installed is read only for a name that is not built in, since that takes milliseconds.
    if name in STRATEGIES or name in FLOWERS or is_place(name):
        return
    if name not in (names := strategy_names()):
        raise unknown("strategy", name, names, after=", or your own module:Class")


def load_strategy(name: str) -> Any:
    """Load the object that a strategy's name stands for, usually a class; it is not checked.

    Raises
    ------
    InvalidValue
        No strategy has that name, two packages register it, or its code cannot be found.
    """
    known = {**STRATEGIES, **FLOWERS}
    if name in known:  # A built-in name has precedence over the names of installed packages.
        return load("strategy", known[name], "Class of a strategy")
    check_strategy_name(name)
    places = _registered().get(name, [])
    if len(places) > 1:
        raise InvalidValue(
            "strategy",
            name,
            f"a name of only one package, but it stands for {' and '.join(sorted(places))}",
        )
    return load("strategy", places[0] if places else name, "Class of a strategy")


def tracker_names(text: str) -> list[str]:
    """Return the trackers that a text names, each once, with commas between them.

    Raises
    ------
    InvalidValue
        A name is neither a known tracker nor of the form ``module:name``.
    """
    names = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    for name in names:
        if name not in TRACKERS and not is_place(name):
            raise unknown("trackers", name, TRACKERS, after=", or your own module:Class")
    return names


def load_tracker(name: str) -> Any:
    """Load the object that a tracker's name stands for; it is not checked.

    Raises
    ------
    InvalidValue
        Its code cannot be found.
    """
    return load("trackers", TRACKERS.get(name, name), "Class of a tracker")


def load(key: str, place: str, what: str) -> Any:
    """Import ``module:name``; modules in the current folder are found as well.

    With Python's option ``-P``, which devices use, modules in the current folder are not found.
    Files in the folder in which a device's process starts are therefore never run as code.

    Parameters
    ----------
    key : str
        The setting that has the place as its value, for the error.
    place : str
        A module and a name in it, separated by a colon.
    what : str
        The kind of object that the name should stand for, for the error. The error shows its first
        word, e.g. of ``"function of a task"``.

    Raises
    ------
    InvalidValue
        There is no such module, or no such name in it.
    """
    if is_held(place):
        return held(key, place)
    module, _, attribute = place.partition(":")
    beside = not sys.flags.safe_path
    if beside and not module.startswith("fedlora_flwr.") and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    word = what.partition(" ")[0]
    try:
        # An error that the module itself raises is not caught, so that its author sees it.
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        where = f"in {Path.cwd()} or" if beside else "that is installed or"
        allowed = f"module:{word}, but {module!r} is not a module {where} on PYTHONPATH"
        raise InvalidValue(key, place, allowed) from error
    if found is None:
        raise InvalidValue(key, place, f"module:{word}, but {module!r} has no {attribute!r}")
    return found


def _registered() -> dict[str, list[str]]:
    """Return the places that installed packages register, by strategy name."""
    return _by_name((p.name, p.value) for p in entry_points(group=STRATEGY_GROUP))


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, place in dict.fromkeys(pairs):
        found.setdefault(name, []).append(place)
    return found
