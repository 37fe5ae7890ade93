"""The leading triplets of a wide product, with SciPy and without it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fedlora_flwr.algebra.triplets import EXACT, leading


@pytest.mark.parametrize("scipy", [True, False])
def test_a_wide_product_has_the_triplets_of_its_svd(
    scipy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not scipy:  # As in an installation of the core.
        monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    draw, rank = np.random.default_rng(3), 4
    B, A = draw.standard_normal((60, 200)), draw.standard_normal((200, 50))
    found = leading(B, A, rank, EXACT)
    assert found is not None
    u, sigma, v = found
    left, values, right = np.linalg.svd(B @ A, full_matrices=False)
    assert sigma == pytest.approx(values[:rank], rel=1e-12)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert (u * sigma) @ v.T == pytest.approx(best, abs=1e-10 * values[0])
