"""Which layers get an adapter: what is usual for a model, and what a pattern may match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora_flwr.errors import InvalidValue

# Families of transformers models of which PEFT does not say what is usual.
_USUAL = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
}
_SHOWN = 8


def usual_targets(
    model: nn.Module, head: tuple[str, ...], known: Mapping[str, Sequence[str] | str]
) -> str:
    """Return the pattern of the layers that are adapted as a rule in a model's family.

    Parameters
    ----------
    model : nn.Module
        A transformers model.
    head : tuple[str, ...]
        Modules that train in full.
    known : Mapping
        Ends of layers' names by family, or a pattern; in force over our own few.

    Raises
    ------
    InvalidValue
        Nothing is known of the family. The message names layers to choose from.
    """
    family = getattr(getattr(model, "config", None), "model_type", "")
    found = known.get(family) or _USUAL.get(family)
    if not found:
        allowed = f"a pattern, as nothing is usual for a {family or type(model).__name__}"
        raise InvalidValue("lora-targets", "", f"{allowed}; {_choice(model, '', head)}")
    return found if isinstance(found, str) else rf"(.*\.)?({'|'.join(map(re.escape, found))})"


def check_targets(model: nn.Module, targets: str, head: tuple[str, ...]) -> None:
    """Refuse a pattern that does not match linear layers alone, by their whole names.

    Parameters
    ----------
    model : nn.Module
        The backbone with its head.
    targets : str
        Regular expression.
    head : tuple[str, ...]
        Modules that train in full, which get no adapters.

    Raises
    ------
    InvalidValue
        It is no regular expression, or matches nothing, something else or a part of the head. The
        message names the module, and layers to choose from, the likeliest first.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise InvalidValue("lora-targets", targets, f"a regular expression ({error})") from error
    found = [(name, module) for name, module in model.named_modules() if pattern.fullmatch(name)]
    choice = _choice(model, targets, head)
    if not found:
        allowed = f"a pattern that matches the whole name of a linear layer; {choice}"
        raise InvalidValue("lora-targets", targets, allowed)
    for name, module in found:
        if not isinstance(module, (nn.Linear, Conv1D)):
            allowed = (
                f"linear layers only: {name or 'the model'!r} is a {type(module).__name__}, which "
                f"cannot be clipped record by record; {choice}"
            )
            raise InvalidValue("lora-targets", targets, allowed)
        if _is_in(name, head):
            allowed = f"layers outside the head: {name!r} trains in full (or train-head = false)"
            raise InvalidValue("lora-targets", targets, allowed)


def _choice(model: nn.Module, targets: str, head: tuple[str, ...]) -> str:
    """Describe the linear layers, one for all that differ in numbers only."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not _is_in(name, head):
            kinds.setdefault(re.sub(r"\b\d+\b", "0", name), name)
    if not kinds:
        return "the model has no linear layers outside its head"
    plain = re.sub(r"\\d[+*]?", "0", targets).replace("\\", "")
    near = sorted(kinds, key=lambda kind: -_likeness(kind, plain))
    return "linear layers are " + ", ".join(repr(kinds[kind]) for kind in near[:_SHOWN])


def _likeness(name: str, pattern: str) -> float:
    last = pattern.rsplit(".", 1)[-1].strip("()*+?$")
    ends = (difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], end) for end in last.split("|"))
    whole = difflib.SequenceMatcher(None, name, pattern)
    return max(end.ratio() for end in ends) + whole.ratio()


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
