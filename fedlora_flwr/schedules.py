"""How a learning rate changes over the rounds of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fedlora_flwr.errors import InvalidValue

_FORM = re.compile(
    r"(?:warmup:(?P<warmup>\d{1,7}) ?)?"
    r"(?:(?P<flat>constant)|(?P<shape>exponential|linear|cosine):(?P<end>\d?\.?\d{1,9}))?"
)
ALLOWED = (
    "constant, exponential:F, linear:F or cosine:F with F from 0 to 1, alone or after 'warmup:N '"
)


@dataclass(frozen=True)
class Schedule:
    """The factor by which a learning rate is multiplied in each round.

    Parameters
    ----------
    shape : str (default: "constant")
        ``"constant"``; ``"exponential"``, which multiplies the factor by `end` after each round; or
        ``"linear"`` or ``"cosine"``, which lower it from 1 to `end` in the last round.
    end : float (default: 1)
        See `shape`; 0 to 1.
    warmup : int (default: 0)
        Number of rounds at the start in which the factor rises linearly; it is 1 in the last of
        them.
    """

    shape: str = "constant"
    end: float = 1.0
    warmup: int = 0

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read ``"constant"``, ``"exponential:0.99"``, ``"warmup:5 cosine:0"`` and the like.

        Raises
        ------
        InvalidValue
            The text has another form, or `end` is above 1.
        """
        found = _FORM.fullmatch(text)
        if not text or text.endswith(" ") or found is None or float(found["end"] or 1) > 1:
            raise InvalidValue("lr-schedule", text, ALLOWED)
        shape = found["shape"] or "constant"
        return cls(shape, float(found["end"] or 1), int(found["warmup"] or 0))

    def factor(self, server_round: int, num_rounds: int) -> float:
        """Return the factor in a round, 0 to 1.

        Parameters
        ----------
        server_round : int
            Round, from 1. A number above ``num_rounds`` counts as the last round.
        num_rounds : int
            Number of rounds of the run, T.
        """
        server_round = min(server_round, num_rounds)
        if server_round < self.warmup:
            return server_round / self.warmup
        first = max(self.warmup, 1)
        if self.shape == "exponential":
            return float(self.end ** (server_round - first))
        done = (server_round - first) / max(num_rounds - first, 1)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.end + (1 - self.end) * left[self.shape]


def is_schedule(text: str) -> bool:
    """Tell whether a text is a schedule."""
    try:
        Schedule.parse(text)
    except InvalidValue:
        return False
    return True
