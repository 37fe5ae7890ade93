"""FedSVD, FlexLoRA, FLoRA and FedEx-LoRA against dense matrices, over rounds and in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp.strategy import Result
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from scipy.stats import ks_2samp  # type: ignore[import-untyped]
from torch import nn

from fedlora_flwr.algebra.factors import Pair
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.layout import Layout, factor_of, folded_names, is_folded
from fedlora_flwr.strategies import FedExLoRA, FedLoRA, FedSVD, FlexLoRA, FLoRA, Upload
from tests.strategies.tiny import Asked, Tiny, arrays_of, declined, record_of, reply_of

Array = NDArray[Any]
Named = Mapping[str, NDArray[Any]]
RANK = 3
SIZES = {"blocks.0.fc": (7, 6), "blocks.1.fc": (5, 9)}
LAYOUT = Layout.of([f"{layer}.lora_{factor}.weight" for layer in SIZES for factor in "AB"])
FOLDING = [FLoRA, FedExLoRA]


def start(rank: int = RANK, seed: int = 0, scale: float = 1.0) -> dict[str, Array]:
    """Return random global arrays; B is not zero, as if rounds had gone before."""
    rng, arrays = np.random.default_rng(seed), {}
    for layer, (m, n) in SIZES.items():
        b, a = LAYOUT.pair(layer)
        arrays[a], arrays[b] = rng.normal(size=(rank, n)), scale * rng.normal(size=(m, rank))
    return {**arrays, "head.bias": rng.normal(size=5)}


def product(arrays: Named, layer: str) -> Array:
    """Return what the arrays add to a layer's weight, folded pair included, as a matrix."""
    names = [LAYOUT.pair(layer), folded_names(layer)]
    terms = [
        arrays[b].astype(np.float64) @ arrays[a].astype(np.float64) for b, a in names if b in arrays
    ]
    return np.asarray(sum(terms), dtype=np.float64)


def folded_product(arrays: Named, layer: str) -> Array:
    b, a = folded_names(layer)
    if b not in arrays:
        return np.zeros(SIZES[layer])
    return np.asarray(arrays[b].astype(np.float64) @ arrays[a].astype(np.float64))


def best(matrix: Array, rank: int) -> Array:
    """Return the best approximation of a rank, by the full matrix's SVD."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def cut(arrays: Named, rank: int) -> dict[str, Array]:
    return {
        name: {"A": array[:rank], "B": array[:, :rank]}.get(factor_of(name) or "", array)
        if factor_of(name)
        else array
        for name, array in arrays.items()
    }


class Federation:
    """A tiny federation that keeps what every client got and sent, round by round."""

    def __init__(
        self,
        strategy: FedLoRA,
        rounds: int,
        clients: int = 3,
        ranks: Sequence[int] = (RANK,),
        answer: Callable[[Asked], RecordDict | None] = lambda _: None,
        arrays: Named | None = None,
    ) -> None:
        self.got: dict[int, dict[int, Named]] = {}
        self.sent: dict[int, dict[int, Named]] = {}
        self._ranks, self._answer = ranks, answer
        self.tiny = Tiny(clients, self.reply)
        with self.tiny.grid() as grid:
            initial = record_of(start() if arrays is None else arrays)
            self.result: Result = strategy.start(grid, initial, num_rounds=rounds)

    def reply(self, asked: Asked) -> RecordDict:
        self.got.setdefault(asked.server_round, {})[asked.partition] = asked.arrays
        own = self._answer(asked)
        if own is not None:
            return own
        asked.arrays = cut(asked.arrays, self._ranks[asked.partition % len(self._ranks)])
        trained = asked.trained()
        self.sent.setdefault(asked.server_round, {})[asked.partition] = {**asked.arrays, **trained}
        weight = float(1 + 3 * asked.partition)
        return reply_of(trained, asked.partition, weight=weight)

    def after(self, server_round: int) -> Named:
        """Return the global arrays after a round, as somebody new would get them."""
        if server_round + 1 in self.got:
            return next(iter(self.got[server_round + 1].values()))
        return arrays_of(self.result.arrays)

    def mean(self, server_round: int, get: Callable[[Named], Array]) -> Array:
        """Return the weighted mean over a round's clients."""
        sent = self.sent[server_round]
        weights = np.array([1 + 3 * partition for partition in sent], dtype=np.float64)
        values = np.stack([get(arrays) for arrays in sent.values()]).astype(np.float64)
        return np.asarray(np.tensordot(weights / weights.sum(), values, axes=1))


def close(found: Array, expected: Array, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("method", [FedSVD, FLoRA, FedExLoRA])
def test_the_global_model_is_the_weighted_mean_of_the_clients_models(method: type[FedLoRA]) -> None:
    run = Federation(method(weighting="size"), rounds=4)
    for server_round in range(1, 5):
        after = run.after(server_round)
        for layer in SIZES:
            expected = run.mean(server_round, partial(product, layer=layer))
            close(product(after, layer), expected)
        close(after["head.bias"], run.mean(server_round, lambda arrays: arrays["head.bias"]))
    if method in FOLDING:
        # The clients' own products do not tell it all: what is folded in is not nothing.
        assert all(np.abs(folded_product(run.after(4), layer)).max() > 0.1 for layer in SIZES)


@pytest.mark.parametrize("method", [FedSVD, FlexLoRA, FLoRA, FedExLoRA])
def test_uniform_weights_are_the_default(method: type[FedLoRA]) -> None:
    run = Federation(method(), rounds=1)
    for layer in SIZES:
        products = [product(arrays, layer) for arrays in run.sent[1].values()]
        expected = np.mean(products, axis=0)
        if method is FlexLoRA:
            expected = best(expected, RANK)
        close(product(run.after(1), layer), expected)
    heads = [arrays["head.bias"] for arrays in run.sent[1].values()]
    close(run.after(1)["head.bias"], np.mean(heads, axis=0))


def drops_out(asked: Asked) -> RecordDict | None:
    """Answer as usual but for client 1 in round 1, 0 in round 2, and 2, which declines, in 3."""
    if (asked.server_round, asked.partition) in ((1, 1), (2, 0)):
        raise RuntimeError("gone")
    return declined(2) if (asked.server_round, asked.partition) == (3, 2) else None


@pytest.mark.parametrize("method", [FedSVD, FLoRA, FedExLoRA])
def test_only_those_who_answer_count(method: type[FedLoRA]) -> None:
    run = Federation(method(weighting="size"), rounds=3, answer=drops_out)
    assert [sorted(run.sent[r]) for r in (1, 2, 3)] == [[0, 2], [1, 2], [0, 1]]
    for server_round in (1, 2, 3):
        for layer in SIZES:
            expected = run.mean(server_round, partial(product, layer=layer))
            close(product(run.after(server_round), layer), expected)


@pytest.mark.parametrize("method", [FedSVD, FLoRA, FedExLoRA])
def test_a_client_that_was_never_drawn_gets_the_whole_model(method: type[FedLoRA]) -> None:
    run = Federation(method(fraction_train=0.5, min_train_nodes=1), rounds=6, clients=4)
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


@pytest.mark.parametrize("method", [FedSVD, FlexLoRA, FLoRA, FedExLoRA])
def test_arrays_keep_their_names_order_type_and_shapes(method: type[FedLoRA]) -> None:
    run = Federation(method(), rounds=3)
    final, initial = arrays_of(run.result.arrays), start()
    assert [name for name in final if not is_folded(name)] == list(initial)
    assert all(final[name].shape == array.shape for name, array in initial.items())
    assert {array.dtype for array in run.result.arrays.values()} == {"float32"}
    extra = {name for name in final if is_folded(name)}
    expected = {name for layer in SIZES for name in folded_names(layer)}
    assert extra == (expected if method in FOLDING else set())


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


def test_folded_ranks_grow_with_the_rounds_up_to_that_of_the_matrix() -> None:
    for method, a_round in ((FLoRA, 2 * RANK), (FedExLoRA, RANK)):
        run = Federation(method(), rounds=4, clients=2)
        for layer, (m, n) in SIZES.items():
            b, a = folded_names(layer)
            ranks = [run.after(r)[b].shape[1] for r in range(1, 5)]
            assert ranks == [min(m, n, a_round * r) for r in range(1, 5)]
            assert ranks == [run.after(r)[a].shape[0] for r in range(1, 5)]


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


@pytest.mark.parametrize("method", FOLDING)
def test_what_is_folded_in_counts_as_sent(method: type[FedLoRA]) -> None:
    strategy = method()
    run = Federation(strategy, rounds=3)
    report = strategy.last_round
    assert report is not None
    got = run.got[3].values()
    assert report.bytes_down > sum(array.nbytes for arrays in got for array in arrays.values())
    plain = sum(len(array.data) for array in record_of(start()).values())
    assert report.bytes_plain < 6 * plain
    assert report.bytes_down > report.bytes_plain / 2


# FLoRA's restart.


def test_flora_restarts_from_zero_b_and_another_a_every_round() -> None:
    def drawn(seed: int) -> list[dict[str, Array]]:
        run = Federation(FLoRA(seed=seed), rounds=3)
        return [
            {name: array for name, array in run.after(r).items() if factor_of(name)}
            for r in (1, 2, 3)
        ]

    first, again, other = drawn(5), drawn(5), drawn(6)
    seen = set()
    for arrays, same, different in zip(first, again, other, strict=True):
        for name, array in arrays.items():
            if factor_of(name) == "B":
                assert not array.any()
                continue
            assert array.tobytes() == same[name].tobytes()
            assert array.tobytes() != different[name].tobytes()
            seen.add(array[0, :3].tobytes())
    # Nor do layers share it.
    assert len(seen) == 3 * len(SIZES)


def test_flora_draws_a_as_peft_does() -> None:
    m, n, rank = 4, 400, 20
    names = LAYOUT.pair("blocks.0.fc")
    current = {names[1]: np.ones((rank, n)), names[0]: np.ones((m, rank))}
    upload = Upload("client", current, 1.0, {})
    fresh = FLoRA(seed=3).aggregate(2, current, [upload])[names[1]]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(n, m))
        adapted: Any = get_peft_model(model, LoraConfig(target_modules="0", r=rank))
    theirs = adapted.base_model.model[0].lora_A["default"].weight.detach().numpy()
    assert fresh.shape == theirs.shape
    assert ks_2samp(fresh.ravel(), theirs.ravel()).pvalue > 1e-3
    assert np.abs(fresh).max() <= n**-0.5
    assert ks_2samp(1.1 * fresh.ravel(), theirs.ravel()).pvalue < 1e-3


# FlexLoRA.


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


@pytest.mark.parametrize("method", [FedSVD, FLoRA, FedExLoRA])
def test_only_flexlora_takes_other_ranks(method: type[FedLoRA]) -> None:
    with pytest.raises(FederationAborted, match="shape of"):
        Federation(method(), 1, ranks=(2,))


@pytest.mark.parametrize("method", [FedSVD, FlexLoRA, FLoRA, FedExLoRA])
def test_a_run_does_not_depend_on_an_earlier_run_of_the_same_strategy(
    method: type[FedLoRA],
) -> None:
    strategy = method()
    Federation(strategy, 2, ranks=(1, 2, 3) if method is FlexLoRA else (RANK,))
    again, fresh = Federation(strategy, 2), Federation(method(), 2)
    for name, array in fresh.result.arrays.items():
        assert again.result.arrays[name].data == array.data, name


@pytest.mark.parametrize("method", [FedSVD, FlexLoRA, FLoRA, FedExLoRA])
def test_arrays_without_a_head_are_enough(method: type[FedLoRA]) -> None:
    arrays = {name: array for name, array in start().items() if factor_of(name)}
    run = Federation(method(), 2, arrays=arrays)
    assert {n for n in run.result.arrays if not is_folded(n)} == set(arrays)


# In fp64, through the strategies' own aggregation.


@st.composite
def federations(draw: st.DrawFn) -> tuple[dict[str, Array], list[Upload]]:
    """Draw global arrays with something folded in, and uploads of one rank with weights."""
    seed, clients = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))
    rank, folds = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    rng = np.random.default_rng(seed)
    current = start(rank, seed)
    for layer, (m, n) in SIZES.items():
        b, a = folded_names(layer)
        current[b], current[a] = rng.normal(size=(m, folds)), rng.normal(size=(folds, n))
    uploads = [
        Upload(
            f"client-{k}",
            {
                name: array + rng.normal(size=array.shape)
                for name, array in current.items()
                if not is_folded(name)
            },
            draw(st.floats(0.1, 10)),
            {},
        )
        for k in range(clients)
    ]
    return current, uploads


def mean_product(uploads: Sequence[Upload], layer: str) -> Array:
    shares = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    return np.asarray(
        sum(share * product(u.arrays, layer) for share, u in zip(shares, uploads, strict=True))
    )


@pytest.mark.parametrize("method", FOLDING)
@given(made=federations())
def test_folding_restores_the_mean_exactly(
    method: type[FedLoRA], made: tuple[dict[str, Array], list[Upload]]
) -> None:
    current, uploads = made
    before = {name: array.copy() for name, array in current.items()}
    after = method().aggregate(1, current, uploads)
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


def test_the_plan_of_each_method() -> None:
    plans = {
        method.__name__: str(method().plan(3, LAYOUT))
        for method in (FedSVD, FlexLoRA, FLoRA, FedExLoRA)
    }
    assert plans == {"FedSVD": "B", "FlexLoRA": "*", "FLoRA": "*", "FedExLoRA": "*"}


def test_replies_in_any_order_give_the_same_bits() -> None:
    for method in (FedSVD, FlexLoRA, FLoRA, FedExLoRA):
        results = set()
        for seed in range(3):
            strategy = method()
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
