"""Records held in memory as tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlora_flwr.errors import InvalidValue


class TensorRecords:
    """Labelled records, one tensor per field.

    Parameters
    ----------
    tensors : Mapping[str, Tensor]
        Fields whose first axis is the record, equally long; at least one.

    Raises
    ------
    InvalidValue
        There is no field, or the fields differ in length.
    """

    alike = True
    """Each record has tensors of the same shape, whatever it is batched with."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidValue("tensors", lengths, "at least one field, all of one length")
        self._tensors = dict(tensors)
        self._length = next(iter(lengths.values()))

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
