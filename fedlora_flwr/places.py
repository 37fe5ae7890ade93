"""Where a name's code is: built-in names, names of installed packages, and ``module:name``.

Code is loaded when a name is used. So a low room can ask for what a high one holds, without an
import that points upwards, and nothing is loaded where nobody asks.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from fedlora_flwr.errors import InvalidValue, unknown

STRATEGY_GROUP = "fedlora_flwr.strategies"
"""The group of entry points under which an installed package names its strategies."""

STRATEGIES: Mapping[str, str] = {
    "dp-lora": "fedlora_flwr.strategies.dp_lora:DPLoRA",
    "ffa-lora": "fedlora_flwr.strategies.ffa_lora:FFALoRA",
    "rolora": "fedlora_flwr.strategies.rolora:RoLoRA",
    "la-lora": "fedlora_flwr.strategies.la_lora:LALoRA",
    "as-lora": "fedlora_flwr.strategies.as_lora:ASLoRA",
    "fedsvd": "fedlora_flwr.strategies.fedsvd:FedSVD",
    "flexlora": "fedlora_flwr.strategies.flexlora:FlexLoRA",
    "flora": "fedlora_flwr.strategies.flora:FLoRA",
    "fedex-lora": "fedlora_flwr.strategies.fedex_lora:FedExLoRA",
    "fedsa-lora": "fedlora_flwr.strategies.fedsa_lora:FedSALoRA",
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
"""Flower's own strategies, to compare with."""


class KnownTask(NamedTuple):
    """What is known of a task before its code is loaded.

    Parameters
    ----------
    place : str
        Its class, as ``module:Class``.
    about : str
        The model and the columns that it takes, and the figure that it shows.
    extras : tuple[str, ...]
        What has to be installed for it, as `fedlora_flwr.errors.require` takes it.
    on_device : tuple[tuple[str, ...], ...]
        Keys that a device's own file gives, of each group at least one (see
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


def is_place(name: str) -> bool:
    """Tell whether a name has the form ``module:name``."""
    return bool(_PLACE.fullmatch(name))


def strategy_names() -> tuple[str, ...]:
    """Return the names of the built-in strategies, of Flower's, and of installed packages."""
    return tuple(dict.fromkeys((*STRATEGIES, *FLOWERS, *sorted(_registered()))))


def check_task_name(name: str) -> None:
    """Refuse what is neither a task of the package nor a place of one.

    Raises
    ------
    InvalidValue
        No task has that name.
    """
    if name not in TASKS and not is_place(name):
        raise unknown("task", name, TASKS, after=", or your own module:function")


def check_strategy_name(name: str) -> None:
    """Refuse what is neither a strategy, of the package or of another, nor a place of one.

    Raises
    ------
    InvalidValue
        No strategy has that name.
    """
    if not is_place(name) and name not in (names := strategy_names()):
        raise unknown("strategy", name, names, after=", or your own module:Class")


def load_strategy(name: str) -> Any:
    """Load what a strategy's name stands for. It is not checked what that is.

    Raises
    ------
    InvalidValue
        No strategy has that name, or two packages give it, or its code is not there.
    """
    known = {**STRATEGIES, **FLOWERS}
    if name in known:  # No package takes a built-in name.
        return load("strategy", known[name], "Class of a strategy")
    check_strategy_name(name)
    places = _registered().get(name, [])
    if len(places) > 1:
        raise InvalidValue(
            "strategy",
            name,
            f"a name that one package gives; this one is {' and '.join(sorted(places))}",
        )
    return load("strategy", places[0] if places else name, "Class of a strategy")


def load(key: str, place: str, what: str) -> Any:
    """Import ``module:name``; modules beside the user's files are found too.

    Not where Python was told to look at no such files (its option ``-P``), as it is on a device:
    there, what lies in the folder that a process is started in does not become code.

    Parameters
    ----------
    key : str
        The setting that names the place.
    place : str
        A module and a name in it, with a colon between them.
    what : str
        What the name is to be, for the error: ``"function of a task"``.

    Raises
    ------
    InvalidValue
        There is no such module, or no such name in it.
    """
    module, _, attribute = place.partition(":")
    beside = not sys.flags.safe_path
    if beside and not module.startswith("fedlora_flwr.") and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    word = what.partition(" ")[0]
    try:
        # An error in the module itself is the author's to read.
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        where = f"in {Path.cwd()} or" if beside else "that is installed or"
        allowed = f"module:{word}; {module!r} is not a module {where} on PYTHONPATH"
        raise InvalidValue(key, place, allowed) from error
    if found is None:
        raise InvalidValue(key, place, f"module:{word}; {module!r} has no {attribute!r}")
    return found


def _registered() -> dict[str, list[str]]:
    """Return the places that installed packages give for each name."""
    return _by_name((p.name, p.value) for p in entry_points(group=STRATEGY_GROUP))


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, place in dict.fromkeys(pairs):
        found.setdefault(name, []).append(place)
    return found
