"""Public weights with which the parts of a gradient enter the joint clip.

The gradient of a head is often much longer than that of the adapters. Under one clip norm C the
head then takes nearly all of it. Weights change the metric in which a record is clipped: each
record's gradient is multiplied by the weight of its part (A, B, head), clipped to C over all parts
together, and noised. After the noise the sum is divided by the same weights, which is
post-processing. A record moves the noisy sum by C at most under any weights, so ε does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora_flwr.config.sections.privacy import LARGEST_WEIGHT, SMALLEST_WEIGHT, PrivacySection
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import part_of
from fedlora_flwr.plan import HEAD, A, B

__all__ = ["EVEN", "ClipWeights"]


@dataclass(frozen=True)
class ClipWeights:
    """What each record's gradient is multiplied by before it is clipped, by part.

    Parameters
    ----------
    a, b, head : float (default: 1.0)
        The weights of A, of B and of the head, from 0.001 to 1,000. Only their ratios matter if C
        is multiplied by the same number.

    Raises
    ------
    InvalidValue
        A weight is out of range.

    Guarantees
    ----------
    *What holds.* The weights are public and fixed for a round. One record moves the clipped sum by
    C at most, under any weights.
    *Under which assumptions.* They are chosen without reading private records.
    *What does not hold.* They do not make noise smaller. With W the diagonal matrix of the weights,
    the noise in a part is σC/(b w), and a record's share of that part has norm C/w at most.

    Examples
    --------
    >>> weights = ClipWeights(head=0.1)
    >>> weights.of("blocks.0.fc.lora_B.weight"), weights.of("head.weight")
    (1.0, 0.1)
    """

    a: float = 1.0
    b: float = 1.0
    head: float = 1.0

    def __post_init__(self) -> None:
        for part in ("a", "b", "head"):
            weight = getattr(self, part)
            if not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT or not math.isfinite(weight):
                allowed = f"a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:,g}"
                raise InvalidValue(f"clip-weight-{part}", weight, allowed)

    @classmethod
    def configured(cls, config: PrivacySection) -> ClipWeights:
        """Return the weights of a run."""
        return cls(config.clip_weight_a, config.clip_weight_b, config.clip_weight_head)

    def of_part(self, part: str) -> float:
        """Return the weight of a part: ``"A"``, ``"B"`` or ``"head"``."""
        return {A: self.a, B: self.b, HEAD: self.head}[part]

    def of(self, name: str) -> float:
        """Return the weight of an array by its name."""
        return self.of_part(part_of(name))


EVEN = ClipWeights()
"""Every part enters the clip as it is."""
