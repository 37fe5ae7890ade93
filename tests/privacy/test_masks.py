from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora_flwr.privacy.masks import _philox_state, own_randomness


def drawn(seed: int) -> list[float]:
    with own_randomness(seed):
        found: list[float] = torch.rand(8).tolist()
    return found


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 100, 127])
def test_masks_follow_every_bit_of_a_seed(bit: int) -> None:
    seed = 0x0123456789ABCDEF0123456789ABCDEF

    assert drawn(seed) == drawn(seed)
    assert drawn(seed) != drawn(seed ^ (1 << bit))
    assert not torch.equal(_philox_state(seed, 0), _philox_state(seed ^ (1 << bit), 0))


def test_the_generator_is_the_twister_with_all_its_words_from_the_seed() -> None:
    words = np.random.SeedSequence(7).generate_state(624, np.uint32)
    twister = np.random.MT19937()
    state: Any = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    twister.state = state
    raw = twister.random_raw(2000)

    with own_randomness(7):
        # 24 bits of each number become a uniform.
        found = torch.rand(2000)

    np.testing.assert_array_equal(found.numpy(), ((raw & 0xFFFFFF) * 2.0**-24).astype(np.float32))


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_generator_is_given_back(fails: bool) -> None:
    before = torch.get_rng_state()
    try:
        with own_randomness(3):
            torch.rand(5)
            if fails:
                raise MemoryError
    except MemoryError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cuda_generator_gets_a_key_and_an_offset_that_it_takes() -> None:
    key, offset = _philox_state(2**100 + 1, 0).numpy().view(np.uint64)
    assert key > 2**32
    assert offset % 4 == 0
    assert 2**40 < offset < 2**63
    assert not torch.equal(_philox_state(5, 0), _philox_state(5, 1))
    if torch.cuda.is_available():
        with own_randomness(5):
            first = torch.rand(9, device="cuda")
        with own_randomness(5):
            assert torch.equal(torch.rand(9, device="cuda"), first)
