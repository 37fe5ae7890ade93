"""Numbers in fp64, which some devices do not have."""

from __future__ import annotations

from torch import Tensor

_WITHOUT_FP64 = frozenset({"mps"})


def with_fp64(tensor: Tensor) -> Tensor:
    """Return a tensor on a device that has fp64: the same one, or a copy on the CPU.

    Parameters
    ----------
    tensor : Tensor
        Any shape and type.
    """
    return tensor.cpu() if tensor.device.type in _WITHOUT_FP64 else tensor
