"""What every method on products of factors is held to; each method's file takes its class."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.layout import factor_of, folded_names, is_folded
from fedlora_flwr.strategies import FedLoRA, FlexLoRA
from tests.strategies.dense import (
    LAYOUT,
    RANK,
    SIZES,
    Federation,
    best,
    close,
    drops_out,
    folded_product,
    product,
    start,
)
from tests.strategies.tiny import Tiny, arrays_of, record_of, reply_of


class Products:
    """What all of them promise."""

    method: ClassVar[type[FedLoRA]]
    planned: ClassVar[str] = "*"
    folds: ClassVar[bool] = False

    def test_the_plan(self) -> None:
        assert str(self.method().plan(3, LAYOUT)) == self.planned

    def test_uniform_weights_are_the_default(self) -> None:
        run = Federation(self.method(), rounds=1)
        for layer in SIZES:
            products = [product(arrays, layer) for arrays in run.sent[1].values()]
            expected = np.mean(products, axis=0)
            if self.method is FlexLoRA:
                expected = best(expected, RANK)
            close(product(run.after(1), layer), expected)
        heads = [arrays["head.bias"] for arrays in run.sent[1].values()]
        close(run.after(1)["head.bias"], np.mean(heads, axis=0))

    def test_arrays_keep_their_names_order_type_and_shapes(self) -> None:
        run = Federation(self.method(), rounds=3)
        final, initial = arrays_of(run.result.arrays), start()
        assert [name for name in final if not is_folded(name)] == list(initial)
        assert all(final[name].shape == array.shape for name, array in initial.items())
        assert {array.dtype for array in run.result.arrays.values()} == {"float32"}
        extra = {name for name in final if is_folded(name)}
        expected = {name for layer in SIZES for name in folded_names(layer)}
        assert extra == (expected if self.folds else set())

    def test_a_run_does_not_depend_on_an_earlier_run_of_the_same_strategy(self) -> None:
        strategy = self.method()
        Federation(strategy, 2, ranks=(1, 2, 3) if self.method is FlexLoRA else (RANK,))
        again, fresh = Federation(strategy, 2), Federation(self.method(), 2)
        for name, array in fresh.result.arrays.items():
            assert again.result.arrays[name].data == array.data, name

    def test_arrays_without_a_head_are_enough(self) -> None:
        arrays = {name: array for name, array in start().items() if factor_of(name)}
        run = Federation(self.method(), 2, arrays=arrays)
        assert {n for n in run.result.arrays if not is_folded(n)} == set(arrays)

    def test_replies_in_any_order_give_the_same_bits(self) -> None:
        results = set()
        for seed in range(3):
            strategy = self.method()
            tiny = Tiny(5, lambda asked: reply_of(asked.trained(), asked.partition))
            with tiny.grid() as grid:
                messages = list(
                    strategy.configure_train(1, record_of(start()), ConfigRecord(), grid)
                )
                replies = list(grid.send_and_receive(messages))
                order = np.random.default_rng(seed).permutation(len(replies))
                arrays, _ = strategy.aggregate_train(1, [replies[i] for i in order])
            assert arrays is not None
            results.add(b"".join(array.data for array in arrays.values()))
        assert len(results) == 1


class ExactMeans(Products):
    """What those promise whose global model is the mean of the clients' models."""

    def test_the_global_model_is_the_weighted_mean_of_the_clients_models(self) -> None:
        run = Federation(self.method(weighting="size"), rounds=4)
        for server_round in range(1, 5):
            after = run.after(server_round)
            for layer in SIZES:
                expected = run.mean(server_round, partial(product, layer=layer))
                close(product(after, layer), expected)
            close(after["head.bias"], run.mean(server_round, lambda arrays: arrays["head.bias"]))
        if self.folds:
            # The clients' own products do not tell it all: what is folded in is not nothing.
            assert all(np.abs(folded_product(run.after(4), layer)).max() > 0.1 for layer in SIZES)

    def test_only_those_who_answer_count(self) -> None:
        run = Federation(self.method(weighting="size"), rounds=3, answer=drops_out)
        assert [sorted(run.sent[r]) for r in (1, 2, 3)] == [[0, 2], [1, 2], [0, 1]]
        for server_round in (1, 2, 3):
            for layer in SIZES:
                expected = run.mean(server_round, partial(product, layer=layer))
                close(product(run.after(server_round), layer), expected)

    def test_a_client_that_was_never_drawn_gets_the_whole_model(self) -> None:
        run = Federation(self.method(fraction_train=0.5, min_train_nodes=1), rounds=6, clients=4)
        joined = [set(run.got[r]) for r in range(1, 7)]
        assert all(len(cohort) == 2 for cohort in joined)
        assert len(set.union(*joined)) == 4
        for server_round in range(1, 7):
            first, second = run.got[server_round].values()
            assert first.keys() == second.keys()
            assert all(first[name].tobytes() == second[name].tobytes() for name in first)
            for layer in SIZES:
                products = [product(arrays, layer) for arrays in run.sent[server_round].values()]
                close(product(run.after(server_round), layer), np.mean(products, axis=0))

    def test_only_flexlora_takes_other_ranks(self) -> None:
        with pytest.raises(FederationAborted, match="shape of"):
            Federation(self.method(), 1, ranks=(2,))


class Folding(ExactMeans):
    """What those promise that fold updates into the frozen weights."""

    folds: ClassVar[bool] = True
    rank_of_a_round: ClassVar[int]

    def test_folded_ranks_grow_with_the_rounds_up_to_that_of_the_matrix(self) -> None:
        run = Federation(self.method(), rounds=4, clients=2)
        for layer, (m, n) in SIZES.items():
            b, a = folded_names(layer)
            ranks = [run.after(r)[b].shape[1] for r in range(1, 5)]
            assert ranks == [min(m, n, self.rank_of_a_round * r) for r in range(1, 5)]
            assert ranks == [run.after(r)[a].shape[0] for r in range(1, 5)]

    def test_what_is_folded_in_counts_as_sent(self) -> None:
        strategy = self.method()
        run = Federation(strategy, rounds=3)
        report = strategy.last_round
        assert report is not None
        got = run.got[3].values()
        assert report.bytes_down > sum(array.nbytes for arrays in got for array in arrays.values())
        plain = sum(len(array.data) for array in record_of(start()).values())
        assert report.bytes_plain < 6 * plain
        assert report.bytes_down > report.bytes_plain / 2
