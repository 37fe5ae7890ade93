"""Records drawn at random in the form of a task's, to look at a model without private values."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_flwr.data.records import Batch, Records, TensorRecords

_WIDTH = 8  # Tokens, where records differ in their number.
_EXTREME = 1e3


def stand_ins(records: Records, count: int, seed: int, *, extreme: bool = False) -> TensorRecords:
    """Draw records of the same fields, types and shapes as a client's.

    Numbers are normal, pictures of bytes uniform, and whole numbers 0 or 1, which any vocabulary
    and any number of classes has. Masks leave the last token out, so that there is padding.

    Parameters
    ----------
    records : Records
        The client's records. Only names, types and shapes are read, of an empty batch where the
        records have one, else of the first record.
    count : int
        Records to draw.
    seed : int
        Public seed of the draws.
    extreme : bool (default: False)
        Make numbers a thousand times as large, and whole numbers all alike.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, tensor in _form(records).items():
        width = min(_WIDTH, getattr(records, "limit", None) or _WIDTH)
        shape = (count, *(size or width for size in tensor.shape[1:]))
        bits = torch.randint(0, 2, shape, generator=generator)
        if tensor.is_floating_point():
            normal = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn[name] = (normal * (_EXTREME if extreme else 1)).to(tensor.dtype)
        elif "mask" in name and len(shape) > 1:
            mask = torch.ones(shape, dtype=tensor.dtype)
            mask[..., 1:][..., -1:] = 0
            drawn[name] = mask
        elif tensor.dtype == torch.uint8 and len(shape) > 2:
            drawn[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            drawn[name] = (torch.ones_like(bits) if extreme else bits).to(tensor.dtype)
    return TensorRecords(drawn)


def _form(records: Records) -> Batch:
    try:
        return records.batch(torch.empty(0, dtype=torch.int64))
    except Exception:  # Collate functions of users' own need not know empty batches.
        return records.batch(torch.zeros(1, dtype=torch.int64))
