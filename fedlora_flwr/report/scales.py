"""Numbers on an axis: round ticks, fewer points where there are many, and how a number reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedlora_flwr.wire import OWN_LABELS

T = TypeVar("T")
Format = Callable[[float], str]
MOST = 150
"""Most points that a chart marks, and most rows of its table."""


WRITTEN = ("rouge_l", "exact_match")
"""Figures of answers that a model writes, shares in [0, 1]."""
BESIDE = (*WRITTEN, OWN_LABELS)
"""Shares in [0, 1] that are shown beside the task's own metric."""
_NAMES = {"rouge_l": "ROUGE-L", OWN_LABELS: "own labels"}


def in_words(metric: str) -> str:
    """Return the name of a metric as it reads in a sentence."""
    return _NAMES.get(metric, metric.replace("_", " "))


def heading(metric: str) -> str:
    """Return the name of a metric with a capital at its beginning."""
    words = in_words(metric)
    return words[:1].upper() + words[1:]


def percent(value: float) -> str:
    """Write a fraction in percent, with one decimal."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def plain(value: float) -> str:
    """Write a number with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def size(count: float) -> str:
    """Write a number of bytes in its largest decimal unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.4g} B"


def duration(seconds: float) -> str:
    """Write a time in the units that a reader thinks in."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Return round numbers that span a range.

    Parameters
    ----------
    low, high : float
        The range; the first and the last tick enclose it.
    most : int (default: 6)
        About how many ticks there may be.
    whole : bool (default: False)
        Whether the numbers count something.
    """
    span = (high - low) or abs(high) or 1.0
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def thinned(items: Sequence[T], most: int = MOST) -> list[T]:
    """Return evenly spread items, the first and the last among them, if there are too many."""
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(n * last / (most - 1))] for n in range(most)]
