"""Names of the server's optimizers. They are apart so that a configuration loads no NumPy."""

from __future__ import annotations

from collections.abc import Mapping

USUAL_RATES: Mapping[str, float] = {"none": 1.0, "momentum": 1.0, "adam": 0.01, "yogi": 0.01}
"""The learning rate of each optimizer where none is given."""
OPTIMIZERS = tuple(USUAL_RATES)
"""``"none"`` sets the model to the mean of the uploads."""
