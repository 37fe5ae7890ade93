"""`ComponentPlan`: which LoRA factor trains, per block and local step.

Every method is a rule for making plans. The server makes one plan per round and sends it as a text.
A client obeys any plan, so the same client works with all methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_flwr.errors import InvalidValue

A = "A"
B = "B"
BOTH = "*"
NEITHER = "-"
MODES = (A, B, BOTH, NEITHER)
HEAD = "head"
"""The part of all arrays that are not factors."""
PARTS = (A, B, HEAD)


@dataclass(frozen=True)
class ComponentPlan:
    """The factors that train in one round.

    Parameters
    ----------
    steps : tuple[str, ...]
        One entry per local step. If the round has more steps, the entries repeat. An entry is a
        string of modes, ``"A"``, ``"B"``, ``"*"`` (both) or ``"-"`` (neither; only the head
        trains): one character for all blocks, or one character per block.

    Raises
    ------
    InvalidValue
        There is no step, a step is empty, steps have different numbers of blocks, or a character is
        not a mode.

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
                "steps joined by '/', each one of 'A', 'B', '*' or '-' for all blocks, or one "
                "such character per block",
            )

    @classmethod
    def parse(cls, text: str) -> ComponentPlan:
        """Read a plan from its text, the inverse of ``str``."""
        return cls(tuple(text.split("/")))

    @classmethod
    def uniform(cls, *modes: str) -> ComponentPlan:
        """Make a plan in which all blocks have the mode ``modes[k - 1]`` at local step k."""
        return cls(modes)

    def __str__(self) -> str:
        return "/".join(self.steps)

    def factors(self, step: int, block: int) -> str:
        """Return the factors that train: ``"A"``, ``"B"``, ``"AB"``, or ``""`` for neither.

        Parameters
        ----------
        step : int
            Local step, from 1.
        block : int
            Position of the block in the model, from 0.
        """
        modes = self.steps[(step - 1) % len(self.steps)]
        mode = modes if len(modes) == 1 else modes[block]
        return {BOTH: "AB", NEITHER: ""}.get(mode, mode)

    def factors_of_round(self, block: int) -> str:
        """Return the factors that a block trains at any step, as `factors` does for one step."""
        steps = range(1, len(self.steps) + 1)
        return "".join(sorted({*"".join(self.factors(step, block) for step in steps)}))

    def check(self, num_blocks: int) -> None:
        """Refuse a plan made for another number of blocks.

        Raises
        ------
        InvalidValue
            A step names modes for more or fewer than ``num_blocks`` blocks.
        """
        for modes in self.steps:
            if len(modes) not in (1, num_blocks):
                raise InvalidValue("plan", str(self), f"1 or {num_blocks} modes per step")
