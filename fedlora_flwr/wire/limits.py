"""Hard limits of the values that server and client may send each other, and their checks.

An honest run never reaches these limits. They ensure that no message can overflow a computation,
fake a line of a log, or fill a disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import MOST_ENTRY

MOST_UPLOADED_ENTRY = 2 * MOST_ENTRY
"""Largest entry of an uploaded array, in absolute value.

Entries of global arrays are at most `MOST_ENTRY`, so there is room for the changes that an honest
client makes in one round. The server's products and stacks of such entries stay far below the
largest fp64 number, and their factors far below the largest fp32 number.
"""
MOST_ARRAYS = 20_000
MOST_ENTRIES = 2**31
"""Largest number of entries in all arrays of one message together."""
RESIDUE = np.dtype(np.uint32)
"""Type of the entries of a secure sum: whole numbers modulo 2³²."""
Residues = NDArray[np.uint32]
"""An array of a secure sum."""
MOST_RECORDS = 10**9
"""Largest number of records that a client may report."""
MOST_WEIGHT = 1e20
"""Largest aggregation weight, unless the run's settings give a smaller limit."""
MOST_NUMBER = 1e15
"""Largest further number of a report, in absolute value; in fp64, whole numbers stay exact."""
MOST_NUMBERS = 64
MOST_NOTES = 32
LONGEST_NAME = 128
LONGEST_TEXT = 256
LONGEST_BYTES = 4096
LONGEST_PACKET = 1 << 24
"""Largest number of bytes in one message of a secure sum: enough for 100,000 clients."""


def shown(value: object) -> object:
    """Return a short form of a value for an error's text: of limited length, on one line."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**20 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return value if len(value) <= 60 else f"{type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"


def within(values: NDArray[Any], most: float) -> bool:
    """Tell whether all entries are finite and at most ``most`` in magnitude."""
    if values.dtype.char in "fd":
        flat = values.ravel()
        # No entry is beyond the root of the sum of squares, and one pass gives that sum. Rounding
        # cannot hide an entry, because a sum of squares never falls.
        if float(np.vdot(flat, flat)) < most * most / 2:
            return True
    # A comparison with NaN is false, so NaN is refused as well.
    return not values.size or bool(values.max() <= most and values.min() >= -most)


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
        Whether infinity is allowed as well, for an unlimited ε.
    above : bool
        Whether ``least`` itself is excluded.
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
        """Check a value and return it; whole numbers as int. ``word`` names it in errors.

        Raises
        ------
        InvalidValue
            The value is not allowed.
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
        The texts that are allowed; empty allows all texts.
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
        """Check a value and return it. ``word`` names it in errors.

        Raises
        ------
        InvalidValue
            The value is not allowed.
        """
        fits = isinstance(value, str) and 1 <= len(value) <= self.longest and value.isprintable()
        if not fits or not str(value).strip() or (self.choices and value not in self.choices):
            raise InvalidValue(word, shown(value), self.allowed)
        return str(value)


@dataclass(frozen=True)
class Packet:
    """Bytes whose content the protocol of secure sums defines.

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
        """Check a value and return it. ``word`` names it in errors.

        Raises
        ------
        InvalidValue
            The value is not allowed.
        """
        if not isinstance(value, bytes) or not 1 <= len(value) <= self.longest:
            raise InvalidValue(word, shown(value), self.allowed)
        return value


NAME = Text(LONGEST_NAME)
ARRAY_NAME = Text(LONGEST_TEXT)
