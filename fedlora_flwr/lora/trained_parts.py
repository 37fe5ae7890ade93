"""The parts of a loaded adapter that can be moved: its factors, its head, the weights below it."""

from __future__ import annotations

from torch import nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import PARTS

WEIGHTS = "W"
"""The weights of the adapted layers themselves, to which products of factors are added."""
MOVABLE = (*PARTS, WEIGHTS)
_MARKS = {
    "A": ".lora_A.",
    "B": ".lora_B.",
    "head": ".modules_to_save.",
    WEIGHTS: ".base_layer.weight",
}


def parameters_of(model: nn.Module, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return the parameters of some parts of an adapter's model, in model order.

    Parameters
    ----------
    model : nn.Module
        The model of `fedlora_flwr.lora.loaded.load_adapter`.
    parts : tuple[str, ...]
        Some of `MOVABLE`. ``"head"`` is every module that the adapter's folder holds in full.

    Raises
    ------
    InvalidValue
        No part is named, a part is unknown or named twice, or the adapter has no parameter in it
        that can be moved.
    """
    if not parts or set(parts) - {*MOVABLE} or len(set(parts)) < len(parts):
        allowed = f"some of {', '.join(MOVABLE)}, each once, joined by commas"
        raise InvalidValue("parts", ",".join(parts), allowed)
    named = list(model.named_parameters())
    found = {
        part: {n for n, p in named if _MARKS[part] in f".{n}" and p.is_floating_point()}
        for part in parts
    }
    if empty := [part for part, names in found.items() if not names]:
        there = [part for part in MOVABLE if any(_MARKS[part] in f".{n}" for n, _ in named)]
        allowed = f"parts that this adapter has: {', '.join(there)}"
        raise InvalidValue("parts", ",".join(empty), allowed)
    chosen = set[str]().union(*found.values())
    return {name: parameter for name, parameter in named if name in chosen}
