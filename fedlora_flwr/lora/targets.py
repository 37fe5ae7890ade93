"""The layers that get an adapter: the usual ones of a model, and checks of a user's pattern."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora_flwr.errors import InvalidValue, unknown
from fedlora_flwr.lora.exported import is_saved
from fedlora_flwr.lora.seeded import seeded

# Usual layers of families of transformers models for which PEFT has no default.
_USUAL = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
}
# Names of the layers that make queries and values, or all inputs of attention, in other families.
_ATTENTION = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"),
    ("qkv_proj",), ("query_key_value",), ("Wqkv",), ("c_attn",),
)  # fmt: skip
# With ``share_att_key``, DeBERTa uses its query and key layers for relative positions as well. Rows
# of positions belong to no record, so these layers cannot be clipped record by record.
_BESIDE_POSITIONS = r".*\.attention\.(self\.value_proj|output\.dense)"
_SHOWN = 8


def usual_targets(
    model: nn.Module, head: tuple[str, ...], known: Mapping[str, Sequence[str] | str]
) -> str:
    """Return the pattern of the layers that usually get an adapter in a model's family.

    Parameters
    ----------
    model : nn.Module
        A transformers model.
    head : tuple[str, ...]
        Names of modules that train in full.
    known : Mapping
        For each family, the last parts of layers' names, or a pattern. It has precedence over the
        families listed in this module.

    Raises
    ------
    InvalidValue
        The family is unknown, and its attention layers have none of the usual names. The message
        names layers to choose from.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if family == "deberta-v2" and getattr(config, "share_att_key", False):
        return _BESIDE_POSITIONS
    found = known.get(family) or _USUAL.get(family) or _attention(model, head)
    if not found:
        allowed = f"a pattern, as a {family or type(model).__name__} has no usual layers"
        raise InvalidValue("lora-targets", "", f"{allowed}; {_choice(model, '', head)}")
    return found if isinstance(found, str) else rf"(.*\.)?({'|'.join(map(re.escape, found))})"


def _attention(model: nn.Module, head: tuple[str, ...]) -> Sequence[str]:
    """Return the first of the usual sets of names that a model's layers have; empty if none."""
    if not hasattr(model, "config"):
        return ()
    ends = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not _is_in(name, head)
    }
    return next((names for names in _ATTENTION if ends.issuperset(names)), ())


def check_targets(model: nn.Module, targets: str, head: tuple[str, ...]) -> None:
    """Refuse a pattern unless it matches whole names of linear layers outside the head only.

    Parameters
    ----------
    model : nn.Module
        The backbone with its head.
    targets : str
        Regular expression.
    head : tuple[str, ...]
        Names of modules that train in full, which get no adapters.

    Raises
    ------
    InvalidValue
        The pattern is not a regular expression; or it matches no module, a module that is not a
        linear layer, or a part of the head. The message names the module, and layers to choose
        from, the most similar first.
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
    """Refuse the name of a head that is not a module's name, or with which another name ends.

    Raises
    ------
    InvalidValue
        The name is refused. The message names similar modules, or the module that ends with it.
    """
    names = [name for name, _ in model.named_modules()]
    for head in heads:
        if head not in names:
            raise unknown("head", head, names)
        # PEFT would train every module whose name ends with this one.
        if also := [name for name in names if name.endswith(head) and name not in heads]:
            allowed = f"a name with which no other name ends, but {also[0]!r} does"
            raise InvalidValue("head", head, allowed)


def check_found_alone(saved: Iterable[str]) -> None:
    """Refuse names of modules with which the name of a module that PEFT adds ends.

    PEFT finds modules that it trains or saves in full by the end of their names, also when it loads
    an adapter's folder. By ``out`` it finds the ``lora_dropout`` of each adapter as well.

    Raises
    ------
    InvalidValue
        There is such a name. The message names PEFT's module.
    """
    for name in saved:
        if added := next((own for own in _added_names() if own.endswith(name)), ""):
            allowed = (
                f"a name with which none of PEFT's own modules ends, but {added!r} in each adapter "
                f"does, and PEFT would take it for the head. Rename {name!r} in the model, for "
                "example to 'classifier'"
            )
            raise InvalidValue("head", name, allowed)


@functools.cache
def _added_names() -> tuple[str, ...]:
    """Return the names of the modules that PEFT adds to a linear layer."""
    config = LoraConfig(r=1, target_modules=["0"])
    with seeded(0):  # The first call must not move the process's own random streams.
        model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), config)
    layer: nn.Module = model.base_model.model[0]
    return tuple(name for name, _ in layer.named_modules() if name)


def check_exportable(model: nn.Module, targets: str, drawn: tuple[str, ...]) -> None:
    """Refuse a pattern whose layers are all drawn at random.

    An export would hold their weights in full, and no adapter at all.

    Raises
    ------
    InvalidValue
        All layers that match are drawn at random. The message names one.
    """
    pattern = re.compile(targets)
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if all(is_saved(name, drawn) for name in found):
        allowed = (
            f"a pattern that also matches a layer of the checkpoint: the weights of {found[0]!r} "
            "are new, so an export would hold them in full and no adapter"
        )
        raise InvalidValue("lora-targets", targets, allowed)


def _choice(model: nn.Module, targets: str, head: tuple[str, ...]) -> str:
    """List the linear layers; of layers whose names differ only in numbers, the first."""
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
