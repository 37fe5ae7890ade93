"""Frozen weights that all processes of a machine share in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from fedlora_flwr.files import cache_folder, read_or_make
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.digests import in_bytes

_LOGGER = logging.getLogger(__name__)


def share(adapted: AdaptedModel) -> Path | None:
    """Replace a model's frozen weights by a memory-mapped file that all processes share.

    The kernel keeps one copy of the file's pages, no matter how many processes map it. The mapping
    is private: if a process writes to a weight, it gets its own copy of that page. The file is
    named after the weights' fingerprint. Mapped weights are used only if they equal the model's.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; the values of its weights do not change. Weights on a GPU are left alone.

    Returns
    -------
    Path or None
        The file, in the user's cache folder. ``None`` if no frozen weights are on the CPU, or if
        the file cannot be used; the latter is logged as a warning.
    """
    tensors = {name: t.detach() for name, t in adapted.frozen() if t.device.type == "cpu"}
    if not tensors:
        return None
    path = cache_folder() / "frozen" / f"{adapted.fingerprint}.pt"
    try:
        mapped = read_or_make(
            path, lambda: _mapped(path, tensors), lambda draft: torch.save(tensors, draft)
        )
    except (OSError, RuntimeError) as error:
        _LOGGER.warning("Frozen weights are not shared between processes: %s", error)
        return None
    for name, tensor in adapted.frozen():
        if name in mapped:
            tensor.data = mapped[name]
    return path


def _mapped(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Map a file's tensors if they are the expected ones."""
    try:
        found = torch.load(path, mmap=True, weights_only=True)
    except Exception:  # A broken file makes torch raise errors of many types.
        return None
    same = found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        # Bytes are compared, since NaN is not equal to itself and some types cannot be compared.
        and torch.equal(in_bytes(found[name]), in_bytes(tensor))
        for name, tensor in expected.items()
    )
    return found if same else None
