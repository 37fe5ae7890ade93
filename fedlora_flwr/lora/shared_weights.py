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
    """Let a model's frozen weights be pages of a file that every process maps.

    The kernel keeps one copy of the file's pages however many processes map it. The mapping is
    private: what a process writes to its weights stays its own, and costs it the page. The file
    is named by the weights' fingerprint, and what is mapped is compared with what was there before.

    Parameters
    ----------
    adapted : AdaptedModel
        The model; the values of its weights stay the same. Weights on a GPU stay where they are.

    Returns
    -------
    Path or None
        The file, in the user's cache folder; ``None`` where there is none, which the log explains
        if it is for trouble with the file.
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
        # By their bytes: NaN differs from itself, and some types know no comparison.
        and torch.equal(in_bytes(found[name]), in_bytes(tensor))
        for name, tensor in expected.items()
    )
    return found if same else None
