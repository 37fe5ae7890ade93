"""Which layers get an adapter: what is usual for a model, and what a pattern may match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.lora.exported import is_saved

# Families of transformers models of which PEFT does not say what is usual.
_USUAL = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
}
# Names that other families give to queries and values, or to all of attention's inputs.
_ATTENTION = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"),
    ("qkv_proj",), ("query_key_value",), ("Wqkv",), ("c_attn",),
)  # fmt: skip
# DeBERTa can use one layer for queries and for the positions, which belong to no record.
_BESIDE_POSITIONS = r".*\.attention\.(self\.value_proj|output\.dense)"
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
        Nothing is known of the family, and its attention has none of the usual names. The message
        names layers to choose from.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if family == "deberta-v2" and getattr(config, "share_att_key", False):
        return _BESIDE_POSITIONS
    found = known.get(family) or _USUAL.get(family) or _attention(model, head)
    if not found:
        allowed = f"a pattern, as nothing is usual for a {family or type(model).__name__}"
        raise InvalidValue("lora-targets", "", f"{allowed}; {_choice(model, '', head)}")
    return found if isinstance(found, str) else rf"(.*\.)?({'|'.join(map(re.escape, found))})"


def _attention(model: nn.Module, head: tuple[str, ...]) -> Sequence[str]:
    """Return the names of a model's attention layers, if they are among those in use."""
    if not hasattr(model, "config"):
        return ()
    ends = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not _is_in(name, head)
    }
    return next((names for names in _ATTENTION if ends.issuperset(names)), ())


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
        The pattern is not a regular expression, or matches nothing, something else or a part of the
        head. The message names the module, and layers to choose from, the likeliest first.
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


def check_head(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Refuse a head that is not a module's name, or that other names end with.

    Raises
    ------
    InvalidValue
        As said. The message names modules that are meant, or the one that has such an end.
    """
    names = [name for name, _ in model.named_modules()]
    for head in heads:
        if head not in names:
            raise unknown("head", head, names)
        # PEFT takes every module whose name ends like this.
        if also := [name for name in names if name.endswith(head) and name not in heads]:
            raise InvalidValue("head", head, f"a name that {also[0]!r} does not end with")


def check_exportable(model: nn.Module, targets: str, drawn: tuple[str, ...]) -> None:
    """Refuse a pattern whose layers are all drawn at random: an export would hold them in full.

    Raises
    ------
    InvalidValue
        As said.
    """
    pattern = re.compile(targets)
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if all(is_saved(name, drawn) for name in found):
        allowed = (
            f"also a layer of the checkpoint: the weights of {found[0]!r} are new, and an exported "
            "adapter would hold them in full instead of an adapter on them"
        )
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
