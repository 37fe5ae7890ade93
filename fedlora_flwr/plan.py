"""Which LoRA factor trains, per block and local step, and the names that this is said in.

Every method is a rule for making plans. The server makes one a round and sends its wire string;
the client obeys any plan. That is why one client serves all methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fedlora_flwr.errors import InvalidValue

A = "A"
B = "B"
BOTH = "*"
MODES = (A, B, BOTH)
# How AS-LoRA chooses: what of curvature it counts, by which rule, and what shares a choice.
CURVATURES = ("none", "secant")
SELECTIONS = ("sample", "argmax", "fixed")
GROUPS = ("block", "tied", "layer")

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
_FOLDED = re.compile(r".+\.folded_[AB]\.weight")
# timm's Swin and ViT, transformers' BERT and RoBERTa, LLaMA and its relatives, GPT-2.
KNOWN_BLOCKS = r"(.*?\.)?(layers\.\d+\.blocks|blocks|encoder\.layers?|layers|transformer\.h)\.\d+"


@dataclass(frozen=True)
class ComponentPlan:
    """What trains in one round.

    Parameters
    ----------
    steps : tuple[str, ...]
        One entry a local step, cycled when the round has more steps. An entry is a string of modes,
        ``"A"``, ``"B"`` or ``"*"`` (both): one character for all blocks alike, or one a block.

    Raises
    ------
    InvalidValue
        No step, an empty step, or a character that is not a mode.

    Examples
    --------
    >>> str(ComponentPlan.parse("B/A"))
    'B/A'
    >>> ComponentPlan.parse("BAB").factors(step=1, block=1)
    'A'
    """

    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        widths = {len(step) for step in self.steps if len(step) != 1}
        if not self.steps or 0 in widths or len(widths) > 1 or set("".join(self.steps)) - {*MODES}:
            raise InvalidValue(
                "plan",
                "/".join(self.steps),
                "steps joined by '/', each one of 'A', 'B', '*' for all blocks, or one such "
                "character a block",
            )

    @classmethod
    def parse(cls, text: str) -> ComponentPlan:
        """Read a plan from its wire string, the inverse of ``str``."""
        return cls(tuple(text.split("/")))

    @classmethod
    def uniform(cls, *modes: str) -> ComponentPlan:
        """Make a plan in which all blocks share a mode, ``modes[k - 1]`` at local step k."""
        return cls(modes)

    def __str__(self) -> str:
        return "/".join(self.steps)

    def factors(self, step: int, block: int) -> str:
        """Return the factors that train: ``"A"``, ``"B"`` or ``"AB"``.

        Parameters
        ----------
        step : int
            Local step, from 1.
        block : int
            Position of the block in the model, from 0.
        """
        modes = self.steps[(step - 1) % len(self.steps)]
        mode = modes if len(modes) == 1 else modes[block]
        return "AB" if mode == BOTH else mode

    def check(self, num_blocks: int) -> None:
        """Refuse a plan made for another number of blocks.

        Raises
        ------
        InvalidValue
            A step names modes for more or fewer than ``num_blocks`` blocks.
        """
        for modes in self.steps:
            if len(modes) not in (1, num_blocks):
                raise InvalidValue("plan", str(self), f"1 or {num_blocks} modes a step")


@lru_cache(maxsize=65536)
def factor_of(name: str) -> str | None:
    """Return ``"A"`` or ``"B"`` for the name of a LoRA factor, ``None`` for a head array."""
    match = _FACTOR.fullmatch(name)
    return match["factor"] if match else None


def is_shared(name: str, shared: str) -> bool:
    """Tell whether an array travels between server and clients.

    Parameters
    ----------
    name : str
        The array.
    shared : str
        The factors that do, ``"A"``, ``"B"`` or ``"AB"``; empty for everything.
    """
    return not shared or (factor_of(name) or "head") in shared


def is_folded(name: str) -> bool:
    """Tell whether an array is half of a pair that a server folds into the frozen weight.

    ``<layer>.folded_B.weight`` (m, q) and ``<layer>.folded_A.weight`` (q, n): the layer's weight
    counts as ``W0 + scaling * B A``. Such arrays never train.
    """
    return _FOLDED.fullmatch(name) is not None


def folded_names(layer: str) -> tuple[str, str]:
    """Return the names of a layer's folded B and A."""
    return f"{layer}.folded_B.weight", f"{layer}.folded_A.weight"


def layer_of(name: str) -> str:
    """Return the layer that a factor belongs to, or the name itself if it is no factor's."""
    match = _FACTOR.fullmatch(name)
    return match["layer"] if match else name


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
        ``layers.0.blocks.1``. A layer that it does not match is a block of its own.
    """

    names: tuple[str, ...]
    pattern: str = ""

    @classmethod
    def of(cls, names: Iterable[str], pattern: str = "") -> Layout:
        """Make the layout of a set of arrays; folded ones among them are left out.

        Raises
        ------
        InvalidValue
            No name is that of a LoRA factor, or ``pattern`` is no regular expression.
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
                "LoRA factors called '<layer>.lora_A.weight' and '<layer>.lora_B.weight', as "
                "peft.get_peft_model_state_dict calls them",
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
        """Position of its block for each LoRA factor's name."""
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
            raise InvalidValue("array names", sorted(self.names)[:5], f"also {sorted(missing)}")
        return pair

    def check_blocks(self) -> None:
        """Refuse layers that the pattern puts in no block.

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
                    "a layer inside a named block: set blocks = '<regular expression>' to one that "
                    "matches each layer's name from its start to the end of its block's name, "
                    r"e.g. '.*\.stages\.\d+'",
                )

    def active(self, plan: ComponentPlan, step: int) -> tuple[str, ...]:
        """Return the names of the arrays that train at local step ``step`` (from 1)."""
        return tuple(name for name in self.names if self._trains(name, plan, step))

    def trained(self, plan: ComponentPlan, num_steps: int) -> tuple[str, ...]:
        """Return the names of the arrays that train at any of a round's ``num_steps`` steps."""
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
