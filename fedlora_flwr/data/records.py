"""Labeled records that are read by position, and such records held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedlora_flwr.errors import InvalidValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Batch = Mapping[str, Tensor]
_AT_ONCE = 1024  # Records that are opened together for their labels.


class Records(Protocol):
    """Labeled records that can be read by position."""

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def batch(self, indices: Tensor) -> Batch:
        """Return the records at ``indices``.

        Parameters
        ----------
        indices : Tensor
            Positions, int64, shape (n,).

        Returns
        -------
        Batch
            Tensors whose first axis is the record, n long.
        """
        ...


def check_records(records: object) -> None:
    """Refuse an object that cannot be read as records.

    Raises
    ------
    InvalidValue
        It has no ``batch`` or no length.
    """
    if not (hasattr(records, "batch") and hasattr(records, "__len__")):
        allowed = "an object with batch(indices) and a length, such as a TensorRecords"
        raise InvalidValue("records", type(records).__name__, allowed)


def lengths_of(records: Records, indices: Tensor) -> NDArray[np.int64] | None:
    """Return the number of tokens of each record at ``indices``, shape (n,).

    They come from the records' attribute ``lengths``, which has one number per record. Without it,
    or if it is ``None``, the result is ``None``.
    """
    lengths: NDArray[np.int64] | None = getattr(records, "lengths", None)
    return None if lengths is None else lengths[indices.numpy()]


class TensorRecords:
    """Labeled records, one tensor per field.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Fields whose first axis is the record, equally long; at least one.
    users : NDArray[np.int64], optional
        The user of each record, shape (n,), for a promise to users (``unit = "user"``).

    Raises
    ------
    InvalidValue
        There is no field, or fields and users differ in length.

    Examples
    --------
    >>> import torch
    >>> records = TensorRecords({"x": torch.zeros(3, 2), "label": torch.tensor([0, 1, 1])})
    >>> records.batch(torch.tensor([2, 0]))["label"].tolist()
    [1, 0]
    """

    alike = True
    """Each record has tensors of the same shape in every batch."""

    def __init__(
        self, tensors: Mapping[str, Tensor], users: NDArray[np.int64] | None = None
    ) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidValue("tensors", lengths, "at least one field, all of one length")
        self._tensors = dict(tensors)
        self._length = next(iter(lengths.values()))
        if users is not None and len(users) != self._length:
            raise InvalidValue("users", len(users), f"one for each of {self._length} records")
        self.users = users

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return copies of the records at ``indices``.

        Parameters
        ----------
        indices : Tensor
            Positions, int64, shape (n,); n may be 0.

        Returns
        -------
        dict[str, Tensor]
            The same fields, n long.
        """
        return {name: tensor.index_select(0, indices) for name, tensor in self._tensors.items()}


def labels_of(records: Records) -> Tensor | None:
    """Return the field ``label`` of all records, shape (n,), on the CPU; None if they have none.

    A batch holds the other fields of its records, too, so few are opened at a time.
    """
    parts = [records.batch(one) for one in torch.split(torch.arange(len(records)), _AT_ONCE)]
    if any("label" not in part for part in parts):
        return None
    return torch.cat([part["label"].cpu() for part in parts])
