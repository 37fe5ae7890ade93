"""Digests of a model's tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(name: str, tensor: Tensor) -> bytes:
    """Return the SHA-256 digest of a tensor's name, shape, type and values, 32 bytes."""
    found = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    found.update(in_bytes(tensor).numpy().tobytes())
    return found.digest()


def joined(digests: Iterable[bytes]) -> str:
    """Return one digest of several, in their order, as 32 hexadecimal digits."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def in_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's values as bytes, shape (n,), on the CPU.

    This works for every shape and type: for a tensor without axes, an empty tensor, and types that
    cannot be compared.
    """
    held = tensor.detach()
    dense = held if held.layout == torch.strided else held.to_dense()
    return dense.cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
