"""Hard limits of what a server and a client may send each other, and how a value is held to them.

The limits are wider than anything that an honest run sends. They are there so that one message
cannot overflow what is computed from it, spoof a line of a log, or fill a disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import MOST_ENTRY

MOST_UPLOADED_ENTRY = 2 * MOST_ENTRY
"""Largest entry of an uploaded array, in absolute value.

Global arrays never have a larger one than `MOST_ENTRY`, so what an honest client adds in one round
still fits. The products and stacks that a server makes of such entries are far from the end of
fp64, and their factors far from the end of fp32.
"""
MOST_ARRAYS = 20_000
MOST_ENTRIES = 2**31
"""Largest number of entries in all arrays of one message together."""
RESIDUE = np.dtype(np.uint32)
"""Type of the entries of a secure sum: whole numbers modulo 2³²."""
Residues = NDArray[np.uint32]
"""An array of a secure sum."""
MOST_RECORDS = 10**9
"""Largest number of records that a client may say it has."""
MOST_WEIGHT = 1e20
"""Largest aggregation weight, where the run's own settings do not give a smaller one."""
MOST_NUMBER = 1e15
"""Largest further number that a client may report, in absolute value: whole ones stay exact."""
MOST_NUMBERS = 64
MOST_NOTES = 32
LONGEST_NAME = 128
LONGEST_TEXT = 256
LONGEST_BYTES = 4096
LONGEST_PACKET = 1 << 24
"""Most bytes of one message of a secure sum: those of 100,000 clients."""


def shown(value: object) -> object:
    """Return a value as an error may show it: of bounded length, and on one line."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**20 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return value if len(value) <= 60 else f"{type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Number:
    """A finite number in a range.

    Parameters
    ----------
    least, most : float
        The range, both ends included.
    whole : bool
        Whether only whole numbers are allowed.
    unbounded : bool
        Whether infinity is allowed too: an ε without a bound.
    above : bool
        Whether ``least`` itself is left out.
    """

    least: float
    most: float
    whole: bool = False
    unbounded: bool = False
    above: bool = False

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        kind = "a whole number" if self.whole else "a number"
        start = f"above {self.least:g}, at most" if self.above else f"from {self.least:g} to"
        return f"{kind} {start} {self.most:g}" + (", or infinity" if self.unbounded else "")

    def read(self, word: str, value: object) -> int | float:
        """Return the value.

        Raises
        ------
        InvalidValue
            It is not allowed.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidValue(word, shown(value), self.allowed)
        if self.unbounded and value == math.inf:
            return math.inf
        # A comparison with NaN is false, and one with a huge whole number is exact.
        fits = self.least <= value <= self.most and not (self.above and value == self.least)
        if not fits or (self.whole and value != int(value)):
            raise InvalidValue(word, shown(value), self.allowed)
        return int(value) if self.whole else value


@dataclass(frozen=True)
class Text:
    """A text of printable characters.

    Parameters
    ----------
    longest : int
        Largest number of characters; the smallest is 1.
    choices : tuple[str, ...]
        The texts that are allowed; all, where there are none.
    """

    longest: int
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        return f"1 to {self.longest} printable characters"

    def read(self, word: str, value: object) -> str:
        """Return the value.

        Raises
        ------
        InvalidValue
            It is not allowed.
        """
        fits = isinstance(value, str) and 1 <= len(value) <= self.longest and value.isprintable()
        if not fits or not str(value).strip() or (self.choices and value not in self.choices):
            raise InvalidValue(word, shown(value), self.allowed)
        return str(value)


@dataclass(frozen=True)
class Packet:
    """Bytes that a protocol reads.

    Parameters
    ----------
    longest : int
        Largest number of bytes; the smallest is 1.
    """

    longest: int

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        return f"1 to {self.longest} bytes"

    def read(self, word: str, value: object) -> bytes:
        """Return the value.

        Raises
        ------
        InvalidValue
            It is not allowed.
        """
        if not isinstance(value, bytes) or not 1 <= len(value) <= self.longest:
            raise InvalidValue(word, shown(value), self.allowed)
        return value


NAME = Text(LONGEST_NAME)
ARRAY_NAME = Text(LONGEST_TEXT)
