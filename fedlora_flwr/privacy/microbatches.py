"""A batch in several forward passes, formed so that no record decides how another is padded.

At extreme weights padding is not without effect: a score may outweigh the mask that is added to it.
So the padded form of a record must be a function of this record alone. It is padded to a width that
follows from its own length, and joins a pass of records of the same width only. What one record
holds then changes nothing in the forward pass of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.tasks.registry import lengths_of

if TYPE_CHECKING:
    from fedlora_flwr.tasks.registry import Batch, Records

# What one more forward and backward pass costs, in tokens. An accelerator waits for launches until
# it has thousands of tokens to work on.
PASS_COST = {"cpu": 64}
PASS_COST_ELSEWHERE = 4096

_NARROWEST, _WIDEST = 4, 64
_GROWTH = 4  # A width is at most a quarter more than the one before it, once widths are large.
_LONGEST = 1 << 20


def passes(
    records: Records, indices: Tensor, batch_size: int, largest: int | None, device: str
) -> Iterator[tuple[Tensor, Batch, bool]]:
    """Cut a batch into forward passes whose records have one shape each on their own account.

    Parameters
    ----------
    records : Records
        The records. Those with ``alike = True`` have tensors of the same shape for each record.
        Those with ``lengths`` and ``pads = True`` have a method ``padded(indices, width)``, which
        pads to at least the width, or to ``limit`` if that is less. All others are asked for one
        by one, and put together by the shapes that they have alone: slower, and as safe.
    indices : Tensor
        The batch, int64, shape (n,); n may be 0.
    batch_size : int
        Expected batch size b, which is public.
    largest : int, optional
        Most records in a pass.
    device : str
        Type of the device that computes, e.g. ``"cpu"``.

    Yields
    ------
    tuple[Tensor, Batch, bool]
        Indices and tensors of a pass, and whether it is the last one. Together they hold each index
        once; there is one pass of none for an empty batch, without tensors.
    """
    held: tuple[Tensor, Batch] = (indices, {})
    started = False
    for made in _passes(records, indices, batch_size, largest, device):
        if started:
            yield *held, False
        held, started = made, True
    yield *held, True


def _passes(
    records: Records, indices: Tensor, batch_size: int, largest: int | None, device: str
) -> Iterator[tuple[Tensor, Batch]]:
    if len(indices) == 0:
        return
    lengths = lengths_of(records, indices)
    keys = None
    widths: NDArray[np.int64] | None = None
    if lengths is not None:
        step = width_step(batch_size, PASS_COST.get(device, PASS_COST_ELSEWHERE))
        widths, keys = widths_of(lengths, step, getattr(records, "limit", None))
    for places in microbatches(keys, len(indices), largest):
        part = indices[places]
        if getattr(records, "alike", False):
            yield part, records.batch(part)
        elif widths is not None and getattr(records, "pads", False):
            yield part, records.padded(part, int(widths[places[0]]))  # type: ignore[attr-defined]
        else:
            yield from _by_shape(records, part)


def microbatches(
    keys: NDArray[np.int64] | None, count: int, largest: int | None = None
) -> list[Tensor]:
    """Put records of one key together.

    Clipped gradients of records add up, so cuts and order change nothing but time, memory and the
    last bits.

    Parameters
    ----------
    keys : NDArray[np.int64], optional
        One number for each record, shape (count,); without them, all are alike and keep their
        order.
    count : int
        Records in the batch; may be 0.
    largest : int, optional
        Most records in a part.

    Returns
    -------
    list[Tensor]
        Positions in the batch, int64: parts of one key each, by ascending key, that together hold
        each position once. One empty part for an empty batch.
    """
    if keys is None or count == 0:
        return list(torch.split(torch.arange(count), largest or max(count, 1)))
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    parts = [torch.from_numpy(part) for part in np.split(order, cuts)]
    return [chunk for part in parts for chunk in torch.split(part, largest or len(part))]


def width_step(batch_size: int, pass_cost: int) -> int:
    """Return how far widths are apart: few passes for small batches, little padding for large ones.

    A step of g has half of it in padding for each record, and a pass for each g tokens of range.
    So the best g goes with the root of the cost of a pass over the batch size.
    """
    return min(max(round(8 * math.sqrt(pass_cost / batch_size)), _NARROWEST), _WIDEST)


def widths_of(
    lengths: NDArray[np.int64], step: int, limit: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the width that each record is padded to, and what may share a pass.

    Both are functions of a record's own length and public numbers. A width has room for one token
    of padding at least: transformers leaves out the mask of a batch that has none, and computes it
    in another way. Records that fill ``limit`` have no padding, and so have passes of their own.

    Parameters
    ----------
    lengths : NDArray[np.int64]
        Tokens of each record, shape (n,).
    step : int
        See `width_step`.
    limit : int, optional
        Most tokens that the model reads.

    Returns
    -------
    tuple[NDArray[np.int64], NDArray[np.int64]]
        Widths, and keys that differ where records must not share a pass, each of shape (n,).
    """
    known = _widths(step)
    widths = known[np.searchsorted(known, lengths, side="right")]
    if limit is not None:
        widths = np.maximum(np.minimum(widths, limit), lengths)
    return widths, 2 * widths + (lengths == widths)


def _widths(step: int) -> NDArray[np.int64]:
    widths = [step]
    while widths[-1] <= _LONGEST:
        widths.append(widths[-1] + max(step, widths[-1] // _GROWTH))
    return np.array(widths, dtype=np.int64)


def _by_shape(records: Records, indices: Tensor) -> Iterator[tuple[Tensor, Batch]]:
    """Collate each record alone, and put together those of one shape."""
    found: dict[object, list[tuple[Tensor, Batch]]] = {}
    for index in torch.split(indices, 1):
        alone = records.batch(index)
        shapes = tuple((name, tensor.shape[1:]) for name, tensor in alone.items())
        mask = alone.get("attention_mask")
        unpadded = mask is not None and bool(mask.all())
        found.setdefault((shapes, unpadded), []).append((index, alone))
    for group in found.values():
        names = group[0][1]
        joined = {name: torch.cat([alone[name] for _, alone in group]) for name in names}
        yield torch.cat([index for index, _ in group]), joined
