"""Random records in the form of a task's records, to check a model without private values."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora_flwr.data.records import Batch, Records, TensorRecords

_WIDTH = 8  # Tokens per record, where the client's records differ in length.
_EXTREME = 1e3


def stand_ins(records: Records, count: int, seed: int, *, extreme: bool = False) -> TensorRecords:
    """Draw records of the same fields, types and shapes as a client's.

    Floating-point numbers are normal, and pictures of bytes are uniform. Whole numbers are 0 or 1,
    which are valid for any vocabulary and any number of classes. Masks leave out the last token, so
    that the records have padding.

    Parameters
    ----------
    records : Records
        The client's records. Only names, types and shapes are read: those of an empty batch if the
        records can make one, otherwise those of the first record.
    count : int
        Number of records to draw.
    seed : int
        Public seed of the draws.
    extreme : bool (default: False)
        Whether floating-point numbers are a thousand times as large and whole numbers are all 1.
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
    except Exception:  # A user's own collate function may fail on an empty batch.
        return records.batch(torch.zeros(1, dtype=torch.int64))
