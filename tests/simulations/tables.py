"""Tables of two classes that a linear module can tell apart."""

from __future__ import annotations

import numpy as np
import pandas as pd


def table(count: int = 160) -> pd.DataFrame:
    """Return rows of four numbers, whose class is the sign of the first."""
    values = np.random.default_rng(3).normal(size=(count, 4))
    frame = pd.DataFrame(values, columns=list("abcd"))
    return frame.assign(label=np.where(frame["a"] > 0, "up", "down"))
