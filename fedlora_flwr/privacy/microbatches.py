"""A batch in several forward passes, formed so that no record decides how another is padded.

At extreme weights padding is not without effect: a score may outweigh the mask that is added to it.
So the padded form of a record must be a function of this record alone. It is padded to a width that
follows from its own length, and joins a pass of records of the same width only. What one record
holds then changes nothing in the forward pass of another of the same shape, to the last bit.

The last bits of a product do depend on how many rows it has, and a server may choose weights that
make last bits decide. Against that there are exact passes: those of one width all have the same
number of records, filled up with copies, so that shapes do not tell how many records of a width
there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.data.records import lengths_of

if TYPE_CHECKING:
    from fedlora_flwr.data.records import Batch, Records

# What one more forward and backward pass costs, in tokens. An accelerator waits for launches until
# it has thousands of tokens to work on.
PASS_COST = {"cpu": 64}
PASS_COST_ELSEWHERE = 4096

_NARROWEST, _WIDEST = 4, 64
_GROWTH = 4  # A width is at most a quarter more than the one before it, once widths are large.
_LONGEST = 1 << 20


class Pass(NamedTuple):
    """One forward and backward pass.

    Parameters
    ----------
    indices : Tensor
        Its records, int64, shape (n,).
    rows : int
        Records in ``batch``, at least n: copies of the first fill it up, after all others.
    batch : Batch
        The tensors.
    is_last : bool
        Whether the step has no further pass.
    """

    indices: Tensor
    rows: int
    batch: Batch
    is_last: bool


@dataclass(frozen=True)
class PassPlan:
    """How batches are cut; public numbers only.

    Parameters
    ----------
    batch_size : int
        Expected batch size b.
    largest : int, optional
        Most records in a pass.
    device : str
        Type of the device that computes, e.g. ``"cpu"``.
    exact : bool
        Fill passes of one width up to one number of records. Where all records have one shape
        nothing is filled, since then the number of records that joined is all that shapes tell, and
        that is drawn without looking at any record.
    """

    batch_size: int
    largest: int | None = None
    device: str = "cpu"
    exact: bool = False

    @property
    def step(self) -> int:
        """Tokens between two widths."""
        return width_step(self.batch_size, self._cost)

    def rows(self, width: int) -> int:
        """Return how many records an exact pass of a width has."""
        tokens = self._cost * max(2.0, math.sqrt(self.batch_size) / 4)
        return max(1, min(round(tokens / width), self.batch_size, self.largest or self.batch_size))

    @property
    def _cost(self) -> int:
        return PASS_COST.get(self.device, PASS_COST_ELSEWHERE)


def passes(records: Records, indices: Tensor, plan: PassPlan) -> Iterator[Pass]:
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
    plan : PassPlan
        How to cut.

    Yields
    ------
    Pass
        Together they hold each index once; there is one pass of none, without tensors, for an
        empty batch.
    """
    held: tuple[Tensor, int, Batch] | None = None
    for made in _passes(records, indices, plan) if len(indices) else ():
        if held is not None:
            yield Pass(*held, False)
        held = made
    yield Pass(*(held or (indices, 0, {})), True)


def _passes(
    records: Records, indices: Tensor, plan: PassPlan
) -> Iterator[tuple[Tensor, int, Batch]]:
    lengths, alike = lengths_of(records, indices), getattr(records, "alike", False)
    pads = lengths is not None and getattr(records, "pads", False)
    keys: NDArray[np.int64] | None = None
    if lengths is not None:
        widths, keys = widths_of(lengths, plan.step, getattr(records, "limit", None))
    for places in microbatches(keys, len(indices), plan.largest):
        part = indices[places]
        if alike:
            yield part, len(part), records.batch(part)
        elif pads:
            width = int(widths[places[0]])
            for chunk in torch.split(part, plan.rows(width)) if plan.exact else (part,):
                rows = plan.rows(width) if plan.exact else len(chunk)
                filled = torch.cat([chunk, chunk[:1].expand(rows - len(chunk))])
                yield chunk, rows, records.padded(filled, width)  # type: ignore[attr-defined]
        else:
            yield from _by_shape(records, part, alone=plan.exact)


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


def _by_shape(
    records: Records, indices: Tensor, *, alone: bool
) -> Iterator[tuple[Tensor, int, Batch]]:
    """Collate each record alone, and put together those of one shape, or none."""
    found: dict[object, list[tuple[Tensor, Batch]]] = {}
    for index in torch.split(indices, 1):
        batch = records.batch(index)
        if alone:
            yield index, 1, batch
            continue
        shapes = tuple((name, tensor.shape[1:]) for name, tensor in batch.items())
        mask = batch.get("attention_mask")
        unpadded = mask is not None and bool(mask.all())
        found.setdefault((shapes, unpadded), []).append((index, batch))
    for group in found.values():
        names = group[0][1]
        joined = {name: torch.cat([batch[name] for _, batch in group]) for name in names}
        yield torch.cat([index for index, _ in group]), len(group), joined
