"""FedSVD: B trains, and the mean product is factored anew."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from fedlora_flwr.layout import factor_of
from fedlora_flwr.strategies import FedSVD, Upload
from tests.strategies.dense import (
    LAYOUT,
    RANK,
    SIZES,
    Array,
    Federation,
    close,
    federations,
)
from tests.strategies.products import ExactMeans
from tests.strategies.resumed import assert_goes_on_bit_for_bit


class TestFedSVD(ExactMeans):
    method = FedSVD
    planned = "B"


def test_fedsvd_sends_b_and_gives_a_orthonormal_a() -> None:
    run = Federation(FedSVD(), rounds=3)
    assert all(str(asked.plan) == "B" for asked in run.tiny.asked)
    for server_round in (1, 2, 3):
        for layer in SIZES:
            b, a = LAYOUT.pair(layer)
            after = run.after(server_round)
            close(after[a] @ after[a].T, np.eye(RANK), 1e-5)
            gram = after[b].T @ after[b]
            close(gram, np.diag(np.diag(gram)), 1e-5)
            assert (np.diff(np.diag(gram)) < 0).all()
    uploads = {name for content in run.tiny.uploads for name in content.array_records["arrays"]}
    assert {factor_of(name) for name in uploads} == {"B", None}


@given(made=federations())
def test_fedsvd_is_the_svd_of_the_mean_product(
    made: tuple[dict[str, Array], list[Upload]],
) -> None:
    current, uploads = made
    of_b = [
        Upload(u.client, {n: x for n, x in u.arrays.items() if factor_of(n) != "A"}, u.weight, {})
        for u in uploads
    ]
    after = FedSVD().aggregate(1, current, of_b)
    rank = current[LAYOUT.names[0]].shape[0]
    for layer in SIZES:
        b, a = LAYOUT.pair(layer)
        shares = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
        mean = np.tensordot(shares, np.stack([u.arrays[b] for u in uploads]), axes=1) @ current[a]
        close(after[b] @ after[a], mean, 1e-12)
        np.testing.assert_allclose(after[a] @ after[a].T, np.eye(rank), rtol=0, atol=1e-10)
        sigma = np.linalg.svd(mean, compute_uv=False)[:rank]
        np.testing.assert_allclose(np.linalg.norm(after[b], axis=0), sigma, rtol=0, atol=1e-10)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FedSVD)
