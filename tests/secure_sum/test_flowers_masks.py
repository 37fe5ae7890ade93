"""Why masks are not Flower's: what docs/trust_models.md says of its generator."""

from __future__ import annotations

import numpy as np
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen


def test_flowers_masks_have_32_bits_of_seed() -> None:
    """Two keys of 256 bits give the same mask if the exclusive or of their words is the same."""
    first, second = bytes(28) + b"\1\2\3\4", b"\1\2\3\4" + bytes(28)

    masks = [pseudo_rand_gen(key, 1 << 32, [(1000,)])[0] for key in (first, second)]

    assert first != second
    assert np.array_equal(masks[0], masks[1])
    seed = int.from_bytes(b"\1\2\3\4", "little")
    own = np.random.RandomState(seed).randint(0, (1 << 32) - 1, 1000, dtype=np.int64)
    assert np.array_equal(masks[0], own)
