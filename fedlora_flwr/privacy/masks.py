"""Random numbers of the forward pass, mainly dropout masks, from all bits of a client's seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fedlora_flwr.lora.seeded import seeded
from fedlora_flwr.randomness import stream_seed

_STATE_AT = 24  # Bytes before the 624 words of torch's Mersenne twister, each in 8 bytes.
_WORDS = 624


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Seed torch's generators from all bits of a seed, and restore their states afterwards.

    Torch draws the dropout masks. On a CPU, ``torch.manual_seed`` uses only 32 bits of its seed, so
    an attacker could try the masks of all seeds on a release. Here the seed fills the whole state
    of the CPU's generator (19,968 bits), and key and offset of each CUDA device's generator (125
    bits, its whole state).

    Parameters
    ----------
    seed : int or None
        At least 0. For private records it must be secret: ``None`` draws it from the operating
        system's random generator.

    Notes
    -----
    A forked process draws its parent's masks. The promise holds for any masks, as long as noise and
    batches are not its parent's (see `RandomStream`).
    """
    if seed is None:
        seed = stream_seed(None)
    # Generators of other accelerators get 63 bits of the seed.
    with seeded(seed % 2**63):
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
    # Torch needs an offset that is a multiple of 4, and counts up from it.
    words = np.array([key, np.uint64(4) * (offset >> np.uint64(3))], dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8).copy())
