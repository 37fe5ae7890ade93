"""One call of a model, which can be repeated for some of its records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedlora_flwr.lora.digests import in_bytes


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model, whose tensors have one row per record.

    Parameters
    ----------
    model : nn.Module
        The model.
    args, kwargs
        Its arguments.
    rows : int
        Number of records.
    form : tuple
        What all rows share: the names, types and shapes of the tensors, and all other values.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    form: tuple[object, ...]

    @classmethod
    def read(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return the call, or ``None`` if a value can't be told apart by record."""
        named = [*enumerate(args), *sorted(kwargs.items())]
        tensors = [value for _, value in named if isinstance(value, Tensor)]
        others = [value for _, value in named if not isinstance(value, Tensor)]
        plain = all(
            value is None or isinstance(value, bool | int | float | str) for value in others
        )
        if not tensors or not plain or any(t.dim() == 0 or t.requires_grad for t in tensors):
            return None
        rows = len(tensors[0])
        if any(len(tensor) != rows for tensor in tensors):
            return None
        form = tuple(
            (name, value.dtype, value.shape[1:], value.device)
            if isinstance(value, Tensor)
            else (name, value)
            for name, value in named
        )
        return cls(model, args, kwargs, rows, form)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return next(v.device for v in (*self.args, *self.kwargs.values()) if torch.is_tensor(v))

    def of(self, rows: Sequence[int]) -> Call:
        """Return the call for some of its records."""

        def chosen(value: Any) -> Any:
            return value[list(rows)] if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(chosen, (self.args, self.kwargs))
        return Call(self.model, args, kwargs, len(rows), self.form)

    def run(self) -> Any:
        """Call the model."""
        return self.model(*self.args, **self.kwargs)

    def keys(self, salt: bytes) -> list[bytes]:
        """Return a digest of each row, its form and ``salt``, 16 bytes."""
        begin = hashlib.blake2b(salt + repr(self.form).encode(), digest_size=16)
        named = [*enumerate(self.args), *sorted(self.kwargs.items())]
        rows = [
            in_bytes(value).view(self.rows, -1).numpy()
            for _, value in named
            if isinstance(value, Tensor) and value.numel()
        ]
        found = []
        for number in range(self.rows):
            one = begin.copy()
            for values in rows:
                one.update(values[number].tobytes())
            found.append(one.digest())
        return found
