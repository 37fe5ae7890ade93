"""Names of the arrays that a federation exchanges, and the blocks that they form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.plan import HEAD, PARTS, A, ComponentPlan

Float = TypeVar("Float", bound=np.floating)

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


_FOLDED = re.compile(r".+\.folded_[AB]\.weight")


# Blocks of timm's Swin and ViT, and of BERT, RoBERTa, GPT-2, LLaMA and its relatives in
# transformers.
KNOWN_BLOCKS = r"(.*?\.)?(layers\.\d+\.blocks|blocks|encoder\.layers?|layers|transformer\.h)\.\d+"


@lru_cache(maxsize=65536)
def factor_of(name: str) -> str | None:
    """Return ``"A"`` or ``"B"`` for the name of a LoRA factor, ``None`` for a head array."""
    match = _FACTOR.fullmatch(name)
    return match["factor"] if match else None


def part_of(name: str) -> str:
    """Return the part of the model that an array belongs to: ``"A"``, ``"B"`` or ``"head"``."""
    return factor_of(name) or HEAD


def by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Group arrays by part, in the order of `PARTS`; parts without arrays are left out."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in names:
        found[part_of(name)].append(name)
    return {part: names for part, names in found.items() if names}


def is_shared(name: str, shared: str) -> bool:
    """Tell whether an array is exchanged between server and clients.

    Parameters
    ----------
    name : str
        The array's name.
    shared : str
        The factors that are exchanged, ``"A"``, ``"B"`` or ``"AB"``; empty if all arrays are.
    """
    return not shared or part_of(name) in shared


def is_folded(name: str) -> bool:
    """Tell whether an array is one of a pair that is folded into a layer's frozen weight.

    The pair is ``<layer>.folded_B.weight`` of shape (m, q) and ``<layer>.folded_A.weight`` of shape
    (q, n). It changes the layer's weight to ``W0 + scaling * B A``, and never trains.
    """
    return _FOLDED.fullmatch(name) is not None


def folded_names(layer: str) -> tuple[str, str]:
    """Return the names of a layer's folded B and A."""
    return f"{layer}.folded_B.weight", f"{layer}.folded_A.weight"


def layer_of(name: str) -> str:
    """Return the layer of a factor by its name; the name of any other array is returned as is."""
    match = _FACTOR.fullmatch(name)
    return match["layer"] if match else name


def rank_axis(name: str) -> int:
    """Return the axis of a factor whose length is the rank r: A is (r, n), B is (m, r)."""
    return 0 if factor_of(name) == A else 1


def leading_ranks(name: str, array: NDArray[Float], rank: int) -> NDArray[Float]:
    """Cut a factor to its first ranks; an array that is not a factor or a matrix is unchanged.

    Parameters
    ----------
    name : str
        The array's name.
    array : ndarray
        A of shape (r, n) or B of shape (m, r).
    rank : int
        Number of ranks to keep. The server has sorted the ranks by weight.
    """
    if factor_of(name) is None or array.ndim != 2:
        return array
    return array[:rank] if rank_axis(name) == 0 else array[:, :rank]


@dataclass(frozen=True)
class Layout:
    """The arrays that a federation exchanges, and the blocks that they form.

    Parameters
    ----------
    names : tuple[str, ...]
        Array names in model order: ``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``, and the
        head's own names.
    pattern : str (default: "")
        Regular expression whose match at the start of a layer's name is the name of its block.
        By default, transformer blocks of the timm ViT and Swin, BERT, RoBERTa, LLaMA and GPT-2
        families: ``blocks.3.attn.qkv`` is in ``blocks.3``, and ``layers.0.blocks.1.mlp.fc1`` in
        ``layers.0.blocks.1``. A layer that the pattern does not match is a block of its own.
    """

    names: tuple[str, ...]
    pattern: str = ""

    @classmethod
    def of(cls, names: Iterable[str], pattern: str = "") -> Layout:
        """Make the layout of a set of arrays; folded arrays are left out.

        Raises
        ------
        InvalidValue
            No name is that of a LoRA factor, or ``pattern`` is not a regular expression.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidValue("blocks", pattern, f"a regular expression ({error})") from error
        layout = cls(tuple(name for name in names if not is_folded(name)), pattern)
        if not layout.blocks:
            raise InvalidValue(
                "array names",
                list(layout.names)[:5],
                "LoRA factors with the names that peft.get_peft_model_state_dict gives them: "
                "'<layer>.lora_A.weight' and '<layer>.lora_B.weight'",
            )
        return layout

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that hold LoRA factors, in model order."""
        return tuple(dict.fromkeys(self._block(layer) for layer in self.layers))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that hold LoRA factors, in model order."""
        return tuple(dict.fromkeys(layer_of(name) for name in self.names if factor_of(name)))

    @cached_property
    def block_index(self) -> dict[str, int]:
        """For each LoRA factor's name, the position of its block in `blocks`."""
        index = {block: position for position, block in enumerate(self.blocks)}
        return {name: index[self._block(layer_of(name))] for name in self.names if factor_of(name)}

    def pair(self, layer: str) -> tuple[str, str]:
        """Return the names of a layer's B and A.

        Raises
        ------
        InvalidValue
            The layout lacks one of them.
        """
        pair = f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"
        if missing := set(pair) - set(self.names):
            allowed = f"both factors of each layer; {sorted(missing)} is missing"
            raise InvalidValue("array names", sorted(self.names)[:5], allowed)
        return pair

    def check_blocks(self) -> None:
        """Refuse layers that the pattern does not match.

        Raises
        ------
        InvalidValue
            Such a layer exists; the message says how to name its block.
        """
        pattern = self.pattern or KNOWN_BLOCKS
        for layer in self.layers:
            if not re.match(pattern, layer):
                raise InvalidValue(
                    "layer",
                    layer,
                    "a layer inside a named block. Set blocks to a regular expression that matches "
                    r"each layer's name up to the end of its block's name, e.g. '.*\.stages\.\d+'",
                )

    def check_plan(self, plan: ComponentPlan) -> None:
        """Refuse a plan that does not fit these arrays.

        Raises
        ------
        InvalidValue
            The plan is for another number of blocks, or has a step in which nothing trains.
        """
        plan.check(len(self.blocks))
        for step, modes in enumerate(plan.steps, start=1):
            if not self.active(plan, step):
                allowed = f"a plan that trains something in every step. In step {step} ({modes!r}) "
                allowed += "no factor trains, and no head is shared (train-head, share-head)"
                raise InvalidValue("plan", str(plan), allowed)

    def active(self, plan: ComponentPlan, step: int) -> tuple[str, ...]:
        """Return the names of the arrays that train at local step ``step``, counted from 1."""
        return tuple(name for name in self.names if self._trains(name, plan, step))

    def trained(self, plan: ComponentPlan, num_steps: int) -> tuple[str, ...]:
        """Return the names of the arrays that train in any of a round's ``num_steps`` steps."""
        steps: Sequence[int] = range(1, min(num_steps, len(plan.steps)) + 1)
        return tuple(
            name for name in self.names if any(self._trains(name, plan, step) for step in steps)
        )

    def _trains(self, name: str, plan: ComponentPlan, step: int) -> bool:
        factor = factor_of(name)
        if factor is None:
            return True
        return factor in plan.factors(step, self.block_index[name])

    def _block(self, layer: str) -> str:
        match = re.match(self.pattern or KNOWN_BLOCKS, layer)
        return match[0] if match and match[0] else layer
