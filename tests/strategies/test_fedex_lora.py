"""FedEx-LoRA: what averaging misses is folded in."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from fedlora_flwr.layout import folded_names, is_folded
from fedlora_flwr.strategies import FedExLoRA, Upload
from tests.strategies.dense import (
    LAYOUT,
    RANK,
    SIZES,
    Array,
    Federation,
    close,
    federations,
    folded_product,
    mean_product,
    product,
)
from tests.strategies.products import Folding
from tests.strategies.resumed import assert_goes_on_bit_for_bit


class TestFedExLoRA(Folding):
    method = FedExLoRA
    rank_of_a_round = RANK


def test_one_client_leaves_no_residual() -> None:
    strategy = FedExLoRA(min_train_nodes=1, min_available_nodes=1)
    run = Federation(strategy, rounds=2, clients=1)
    for server_round in (1, 2):
        sent, after = run.sent[server_round][0], run.after(server_round)
        for layer in SIZES:
            b, a = folded_names(layer)
            assert (after[b].shape, after[a].shape) == (
                (SIZES[layer][0], 0),
                (0, SIZES[layer][1]),
            )
            close(product(after, layer), product(sent, layer))


@given(made=federations())
def test_folding_restores_the_mean_exactly(
    made: tuple[dict[str, Array], list[Upload]],
) -> None:
    current, uploads = made
    before = {name: array.copy() for name, array in current.items()}
    after = FedExLoRA().aggregate(1, current, uploads)
    for layer in SIZES:
        expected = folded_product(before, layer) + mean_product(uploads, layer)
        close(product(after, layer), expected, 1e-12)
    assert all(np.array_equal(current[name], array) for name, array in before.items())


@given(made=federations())
def test_the_residual_is_the_covariance_of_the_factors(
    made: tuple[dict[str, Array], list[Upload]],
) -> None:
    current, uploads = made
    current = {name: array for name, array in current.items() if not is_folded(name)}
    after = FedExLoRA().aggregate(1, current, uploads)
    shares = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    for layer in SIZES:
        b, a = LAYOUT.pair(layer)
        expected = np.zeros(SIZES[layer])
        for share, upload in zip(shares, uploads, strict=True):
            expected += share * (upload.arrays[b] - after[b]) @ (upload.arrays[a] - after[a])
        np.testing.assert_allclose(folded_product(after, layer), expected, rtol=0, atol=1e-11)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FedExLoRA)
