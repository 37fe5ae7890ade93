"""The head's mean, for methods that do not average factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.means import Arrays, merge, weighted_mean
from fedlora_flwr.layout import factor_of
from fedlora_flwr.strategies.replies import Upload


def average_heads(current: Arrays, uploads: Sequence[Upload]) -> dict[str, NDArray[np.floating]]:
    """Return the global arrays with the mean of the heads; factors are left as they are."""
    heads = [{n: x for n, x in u.arrays.items() if not factor_of(n)} for u in uploads]
    return merge(current, weighted_mean(heads, [upload.weight for upload in uploads]))
