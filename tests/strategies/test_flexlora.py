"""FlexLoRA: clients of different ranks, and the mean product cut to each."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.algebra.factors import Pair
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.layout import factor_of
from fedlora_flwr.strategies import FlexLoRA, Upload
from tests.strategies.dense import (
    LAYOUT,
    RANK,
    SIZES,
    Array,
    Federation,
    best,
    close,
    cut,
    federations,
    mean_product,
    product,
    start,
)
from tests.strategies.products import Products
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import Asked, arrays_of, reply_of


class TestFlexLoRA(Products):
    method = FlexLoRA


def test_flexlora_averages_the_products_and_cuts_them_to_each_clients_rank() -> None:
    ranks, rounds = (1, 2, 3), 4
    run = Federation(FlexLoRA(weighting="size"), rounds, ranks=ranks)
    for server_round in range(1, rounds + 1):
        for layer in SIZES:
            mean = run.mean(server_round, partial(product, layer=layer))
            assert np.linalg.matrix_rank(mean, tol=1e-4) > RANK
            if server_round < rounds:
                for partition, rank in enumerate(ranks):
                    got = run.got[server_round + 1][partition]
                    b, a = LAYOUT.pair(layer)
                    assert (got[b].shape[1], got[a].shape[0]) == (rank, rank)
                    close(product(got, layer), best(mean, rank))
            else:
                close(product(arrays_of(run.result.arrays), layer), best(mean, RANK))
        head = run.mean(server_round, lambda arrays: arrays["head.bias"])
        for got in run.got.get(server_round + 1, {}).values():
            close(got["head.bias"], head)


def test_flexlora_sends_all_ranks_until_a_client_has_told_its_own() -> None:
    ranks, clients = (1, 2), 4
    strategy = FlexLoRA(fraction_train=0.5, min_train_nodes=1)
    run = Federation(strategy, 7, clients, ranks)
    known: set[int] = set()
    fresh = 0
    _, a = LAYOUT.pair("blocks.0.fc")
    for server_round in range(1, 8):
        for partition, got in run.got[server_round].items():
            expected = ranks[partition % 2] if partition in known else RANK
            assert got[a].shape[0] == expected
            fresh += server_round > 1 and partition not in known
        known |= set(run.got[server_round])
    assert fresh > 0
    assert known == set(range(clients))


def test_flexlora_tells_clients_by_who_they_are_and_counts_what_it_sends() -> None:
    strategy = FlexLoRA()
    run = Federation(strategy, 2, ranks=(1, 2, 3))
    report = strategy.last_round
    assert report is not None
    whole = sum(array.size for array in start().values()) * 4
    got = [sum(array.nbytes for array in run.got[2][k].values()) for k in range(3)]
    assert sum(got) < report.bytes_down < 3 * whole + 3 * 5 * 200
    assert got[0] < got[1] < got[2] == whole
    assert report.bytes_plain == 6 * sum(len(a.data) for a in run.result.arrays.values())


def test_flexlora_without_ranks_of_their_own_is_the_cut_mean() -> None:
    run = Federation(FlexLoRA(), rounds=3)
    for server_round in (1, 2, 3):
        for layer in SIZES:
            mean = np.mean(
                [product(arrays, layer) for arrays in run.sent[server_round].values()], axis=0
            )
            close(product(run.after(server_round), layer), best(mean, RANK))
            _, a = LAYOUT.pair(layer)
            after = run.after(server_round)
            close(after[a] @ after[a].T, np.eye(RANK), 1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((4, 4, 4, 4), "one rank of 1 to 3"),
        ((0, 0, 0, 0), "one rank of 1 to 3"),
        ((1, 2, 1, 2), "one rank of 1 to 3"),
        ((2, 2, 1, 1), "one rank of 1 to 3"),
    ],
)
def test_an_upload_of_other_ranks_is_refused_and_the_rest_goes_on(
    shapes: tuple[int, ...], message: str
) -> None:
    def answer(asked: Asked) -> RecordDict | None:
        if asked.partition:
            return None
        arrays = dict(start())
        for name, rank in zip(LAYOUT.names, shapes, strict=True):
            m_or_n = arrays[name].shape[1 if factor_of(name) == "A" else 0]
            arrays[name] = np.ones((rank, m_or_n) if factor_of(name) == "A" else (m_or_n, rank))
        return reply_of(arrays, 0)

    strategy = FlexLoRA()
    run = Federation(strategy, 1, answer=answer)
    report = strategy.last_round
    assert report is not None
    assert [upload.client for upload in report.uploads] == ["partition-000001", "partition-000002"]
    assert len(report.failures) == 1
    assert message in report.failures[0]
    for layer in SIZES:
        mean = np.mean([product(arrays, layer) for arrays in run.sent[1].values()], axis=0)
        close(product(run.after(1), layer), best(mean, RANK))


def test_an_upload_of_another_shape_is_refused() -> None:
    def answer(asked: Asked) -> RecordDict:
        arrays = {name: array.T for name, array in start(2).items()}
        return reply_of(arrays, asked.partition)

    with pytest.raises(FederationAborted, match="0 of 3 clients answered"):
        Federation(FlexLoRA(), 1, answer=answer)


@given(made=federations(), data=st.data())
def test_flexlora_is_the_truncated_svd_of_the_mean_product(
    made: tuple[dict[str, Array], list[Upload]], data: st.DataObject
) -> None:
    current, whole = made
    rank = current[LAYOUT.names[0]].shape[0]
    uploads = [
        Upload(u.client, cut(u.arrays, data.draw(st.integers(1, rank))), u.weight, {})
        for u in whole
    ]
    after = FlexLoRA().aggregate(1, current, uploads)
    for layer in SIZES:
        b, a = LAYOUT.pair(layer)
        mean = mean_product(uploads, layer)
        sigma = np.linalg.svd(mean, compute_uv=False)
        found: Pair = after[b], after[a]
        # The error is what no approximation of that rank can avoid.
        error = np.linalg.svd(mean - found[0] @ found[1], compute_uv=False)
        np.testing.assert_allclose(error[: len(sigma) - rank], sigma[rank:], rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(found[0], axis=0), sigma[:rank], atol=1e-10)
        np.testing.assert_allclose(found[1] @ found[1].T, np.eye(rank), rtol=0, atol=1e-10)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FlexLoRA, ranks=(1, 2, 3))
