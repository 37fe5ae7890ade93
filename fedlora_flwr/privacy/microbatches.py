"""A batch in several forward passes, formed so that no record decides how another is padded.

With extreme weights padding has an effect: a score may outweigh the mask that is added to it.
The padded form of a record must therefore depend on this record alone. It is padded to a width that
follows from its own length, and shares a pass with records of the same width only. Its content then
changes nothing, not even the last bit, in the forward pass of another record of the same shape.

The last bits of a product do depend on its number of rows, and a server may choose weights that
amplify last bits. Exact passes prevent this: all passes of one width have the same number of
records, filled up with copies, so that shapes do not reveal how many records have this width.
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

# The cost of one more forward and backward pass, in tokens: the number of tokens that would take as
# long. On an accelerator, launches dominate the time of a pass of fewer than thousands of tokens.
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
        Positions of its records, int64, shape (n,).
    rows : int
        Number of records in ``batch``, at least n. After the n records come copies of the first.
    batch : Batch
        The tensors of all rows.
    is_last : bool
        Whether this is the last pass of the step.
    """

    indices: Tensor
    rows: int
    batch: Batch
    is_last: bool


@dataclass(frozen=True)
class PassPlan:
    """How batches are cut into passes. All of these values are public.

    Parameters
    ----------
    batch_size : int
        Expected batch size b.
    largest : int, optional
        Largest number of records in a pass; by default no limit.
    device : str
        Type of the device that computes, e.g. ``"cpu"``.
    exact : bool
        Whether all passes of one width are filled up to the same number of records. Where all
        records have one shape, nothing is filled: shapes then reveal only how many records joined,
        and this number is drawn independently of the records.
    grouped : bool
        Whether units of several records join. How many records join then depends on the records,
        so exact passes are also filled where all records have one shape.
    """

    batch_size: int
    largest: int | None = None
    device: str = "cpu"
    exact: bool = False
    grouped: bool = False

    @property
    def step(self) -> int:
        """Smallest difference of two widths, in tokens."""
        return width_step(self.batch_size, self._cost)

    def rows(self, width: int) -> int:
        """Return the number of records in an exact pass of a width."""
        tokens = self._cost * max(2.0, math.sqrt(self.batch_size) / 4)
        return max(1, min(round(tokens / width), self.batch_size, self.largest or self.batch_size))

    @property
    def _cost(self) -> int:
        return PASS_COST.get(self.device, PASS_COST_ELSEWHERE)


def passes(records: Records, indices: Tensor, plan: PassPlan) -> Iterator[Pass]:
    """Cut a batch into forward passes; each record's shape there depends on this record alone.

    Parameters
    ----------
    records : Records
        The records. With ``alike = True``, all records have tensors of the same shape. With
        ``lengths`` and ``pads = True``, they have a method ``padded(indices, width)``, which pads
        to at least the width, or to ``limit`` if that is less. All other records are read one by
        one and grouped by the shapes that they have alone, which is slower but just as safe.
    indices : Tensor
        The batch, int64, shape (n,); n may be 0.
    plan : PassPlan
        How to cut.

    Yields
    ------
    Pass
        Together the passes hold each index once. For an empty batch there is one pass without
        records and tensors.
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
            rows = plan.rows(1) if plan.exact and plan.grouped else len(part)
            for chunk in torch.split(part, rows):
                yield chunk, rows, records.batch(_filled(chunk, rows))
        elif pads:
            width = int(widths[places[0]])
            for chunk in torch.split(part, plan.rows(width)) if plan.exact else (part,):
                rows = plan.rows(width) if plan.exact else len(chunk)
                yield chunk, rows, records.padded(_filled(chunk, rows), width)  # type: ignore[attr-defined]
        else:
            yield from _by_shape(records, part, alone=plan.exact)


def _filled(indices: Tensor, rows: int) -> Tensor:
    """Return positions, followed by copies of the first up to a number of rows."""
    return torch.cat([indices, indices[:1].expand(rows - len(indices))])


def microbatches(
    keys: NDArray[np.int64] | None, count: int, largest: int | None = None
) -> list[Tensor]:
    """Group the records of a batch by key, and cut large groups.

    Clipped gradients of records add up, so cuts and order change only time, memory and the last
    bits of the sum.

    Parameters
    ----------
    keys : NDArray[np.int64], optional
        One number for each record, shape (count,). Without keys, all records form one group and
        keep their order.
    count : int
        Number of records in the batch; may be 0.
    largest : int, optional
        Largest number of records in a part; by default no limit.

    Returns
    -------
    list[Tensor]
        Positions in the batch, int64. Each part has one key; parts are in ascending order of keys
        and together hold each position once. An empty batch gives one empty part.
    """
    if keys is None or count == 0:
        return list(torch.split(torch.arange(count), largest or max(count, 1)))
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    parts = [torch.from_numpy(part) for part in np.split(order, cuts)]
    return [chunk for part in parts for chunk in torch.split(part, largest or len(part))]


def width_step(batch_size: int, pass_cost: int) -> int:
    """Return the smallest difference of two widths, in tokens: the larger, the smaller the batch.

    With a difference of g, each record gets g/2 tokens of padding on average, and there is one pass
    per g tokens of range. The best g is therefore proportional to sqrt(pass cost / batch size).
    """
    return min(max(round(8 * math.sqrt(pass_cost / batch_size)), _NARROWEST), _WIDEST)


def widths_of(
    lengths: NDArray[np.int64], step: int, limit: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the width that each record is padded to, and a key: equal keys may share a pass.

    Both are functions of a record's own length and public numbers. A width is longer than the
    record by at least one token: for a batch without padding, transformers drops the mask and
    computes in another way. Records that fill ``limit`` have no padding, so they share passes only
    with each other.

    Parameters
    ----------
    lengths : NDArray[np.int64]
        Tokens of each record, shape (n,).
    step : int
        Smallest difference of two widths, in tokens (see `width_step`).
    limit : int, optional
        Largest number of tokens that the model reads.

    Returns
    -------
    tuple[NDArray[np.int64], NDArray[np.int64]]
        Widths in tokens, and keys that differ where records must not share a pass, each of shape
        (n,).
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
    """Collate each record alone; group those of one shape, or with ``alone`` group none."""
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
