"""A batch in several forward passes: by memory, and by length where records differ in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What one more forward and backward pass costs, in tokens; where less padding is saved by it, a cut
# does not pay. An accelerator waits for launches until it has thousands of tokens to work on.
PASS_COST = {"cpu": 64}
PASS_COST_ELSEWHERE = 4096


def microbatches(
    indices: Tensor,
    lengths: NDArray[np.int64] | None = None,
    largest: int | None = None,
    pass_cost: int = PASS_COST["cpu"],
) -> list[Tensor]:
    """Cut a batch into parts that are run one after another.

    Each part is padded to its longest record only. Clipped gradients of records add up, so cuts
    and order change nothing but time, memory and the last bits.

    Parameters
    ----------
    indices : Tensor
        The batch, int64, shape (n,); n may be 0.
    lengths : NDArray[np.int64], optional
        Tokens of each record *of the batch*, shape (n,); without them, the order is kept.
    largest : int, optional
        Most records in a part.
    pass_cost : int (default: 64)
        Cut only where it saves more padded tokens than this.

    Returns
    -------
    list[Tensor]
        Parts that together hold each index once; one empty part for an empty batch.
    """
    if lengths is None:
        return list(torch.split(indices, largest or max(len(indices), 1)))
    order = np.argsort(lengths, kind="stable")
    ordered, sizes = indices[torch.from_numpy(order)], lengths[order]
    parts = [ordered[first:end] for first, end in _cut(sizes, 0, len(sizes), pass_cost)]
    return [chunk for part in parts for chunk in torch.split(part, largest or max(len(part), 1))]


def _cut(sizes: NDArray[np.int64], first: int, end: int, cost: int) -> Iterator[tuple[int, int]]:
    """Halve a run of ascending sizes where that saves most, as long as it pays."""
    if end - first > 1:
        saved = np.arange(1, end - first) * (sizes[end - 1] - sizes[first : end - 1])
        best = int(saved.argmax())
        if saved[best] > cost:
            yield from _cut(sizes, first, first + best + 1, cost)
            yield from _cut(sizes, first + best + 1, end, cost)
            return
    yield first, end
