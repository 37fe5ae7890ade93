"""Randomness of the forward pass, of dropout masks above all, from all bits of a client's seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_STATE_AT = 24  # Bytes before the 624 words of torch's Mersenne twister, each in 8 bytes.
_WORDS = 624


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Let torch draw what follows from all bits of a seed, and give its generators back after.

    Dropout masks are drawn by torch. ``torch.manual_seed`` reads 32 bits of its seed on a CPU: few
    enough to try all masks on a release. Here the seed fills the whole state of the CPU's generator
    (19,968 bits), and key and offset of each CUDA device's (125 bits, all that it has).

    Parameters
    ----------
    seed : int
        At least 0. For private records it must be secret, as of `stream_seed` with ``None``.
    """
    with torch.random.fork_rng():
        # Other accelerators follow 64 bits of it.
        torch.manual_seed(seed % 2**63)
        torch.set_rng_state(_twister_state(seed))
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.set_rng_state(_philox_state(seed, device), device)
        yield


def _twister_state(seed: int) -> torch.Tensor:
    words = np.random.SeedSequence(seed).generate_state(_WORDS, np.uint32)
    state = torch.Generator().manual_seed(0).get_state().numpy()
    state[_STATE_AT : _STATE_AT + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)
    return torch.from_numpy(state)


def _philox_state(seed: int, device: int) -> torch.Tensor:
    key, offset = np.random.SeedSequence([seed, device]).generate_state(2, np.uint64)
    # An offset is a multiple of 4 and counts up from here.
    words = np.array([key, np.uint64(4) * (offset >> np.uint64(3))], dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8).copy())
