"""FlexLoRA's clients: each trains its own rank of what the server sends."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlora_flwr.clients.numpy_client import LoRAClient
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of, folded_names
from fedlora_flwr.privacy.ledger import Ledger
from tests.clients.asking import Asker
from tests.conftest import MakeConfig

Arrays = dict[str, NDArray[np.float32]]
RANKS = "2,4,1"


def flex(make_config: MakeConfig, **changes: Any) -> RunConfig:
    usual: dict[str, Any] = {"strategy": "flexlora", "rank": 4, "client_ranks": RANKS}
    return make_config(**{**usual, **changes})


def asker_of(config: RunConfig, client: int = 0) -> Asker:
    """Return an asker of one client, with arrays in which every rank differs."""
    asker = Asker(config)
    rng = np.random.default_rng(0)
    asker.start = {
        name: 0.1 * rng.normal(size=array.shape).astype(np.float32)
        for name, array in asker.start.items()
    }
    with asker.grid.running():
        for node in asker.grid.get_node_ids():
            (reply,) = asker.grid.send_and_receive([Message(RecordDict(), node, "query")])
            if reply.content.config_records["config"]["client"] == f"partition-{client:06d}":
                asker.node = node
    return asker


def uploaded(asker: Asker, plan: str = "*", **settings: Any) -> Arrays:
    content = asker.train(plan, **settings)
    return {name: array.numpy() for name, array in content.array_records["arrays"].items()}


def leading(arrays: Arrays, rank: int) -> Arrays:
    """Return the leading rows of A and columns of B."""
    slices: dict[str | None, Any] = {"A": np.s_[:rank], "B": np.s_[:, :rank], None: np.s_[:]}
    return {name: array[slices[factor_of(name)]] for name, array in arrays.items()}


def rows(config: RunConfig) -> int:
    with closing(sqlite3.connect(state_folder(config) / "ledger.sqlite")) as db:
        return int(db.execute("SELECT COUNT(*) FROM releases").fetchone()[0])


def equal(one: Arrays, other: Arrays) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("client", "rank"), [(0, 2), (1, 4), (2, 1), (3, 2)])
def test_each_simulated_client_trains_and_sends_its_own_rank(
    make_config: MakeConfig, client: int, rank: int
) -> None:
    asker = asker_of(flex(make_config, num_clients=4), client)
    found, expected = uploaded(asker), leading(asker.start, rank)
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in expected.items()}
    assert not any(np.array_equal(found[name], expected[name]) for name in found)


def test_the_leading_ranks_are_kept(make_config: MakeConfig) -> None:
    asker = asker_of(flex(make_config, lr_a=0.0, lr_b=0.0, lr_head=0.0))
    assert equal(uploaded(asker), leading(asker.start, 2))


def test_a_download_that_the_server_has_cut_gives_the_same(make_config: MakeConfig) -> None:
    asker = asker_of(flex(make_config))
    whole = uploaded(asker)
    asker.start = leading(asker.start, 2)
    assert equal(uploaded(asker), whole)


@pytest.mark.parametrize("plan", ["*", "B", "B/A"])
def test_a_cut_client_trains_like_a_full_one_whose_other_ranks_are_zero(
    make_config: MakeConfig, plan: str
) -> None:
    # No noise, which would fill the other ranks.
    asker = asker_of(flex(make_config, epsilon=math.inf, local_steps=3))
    found = uploaded(asker, plan)
    full = asker_of(make_config(epsilon=math.inf, local_steps=3, rank=4))
    cut = leading(asker.start, 2)
    full.start = {
        name: np.pad(
            array,
            [(0, to - of) for of, to in zip(array.shape, full.start[name].shape, strict=True)],
        )
        for name, array in cut.items()
    }
    expected = uploaded(full, plan)
    for name, array in leading(expected, 2).items():
        if name in found:
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-6)
    assert all(
        np.count_nonzero(expected[n]) == np.count_nonzero(leading(expected, 2)[n]) for n in found
    )


def test_one_process_serves_clients_of_all_ranks_in_any_order(make_config: MakeConfig) -> None:
    config = flex(make_config)

    def run(order: list[int]) -> dict[int, Arrays]:
        process_trainer.cache_clear()
        return {client: uploaded(asker_of(config, client)) for client in order}

    first, second = run([0, 1, 2]), run([2, 1, 0])
    assert all(equal(first[client], second[client]) for client in range(3))


def test_folded_pairs_and_head_are_not_cut(make_config: MakeConfig) -> None:
    asker = asker_of(flex(make_config, client_ranks="1", lr_a=0.0, lr_b=0.0, lr_head=0.0))
    layer = asker.adapted.layers[0]
    b, a = folded_names(layer.name)
    rng = np.random.default_rng(1)
    asker.start[b] = rng.normal(size=(layer.B.shape[0], 3)).astype(np.float32)
    asker.start[a] = rng.normal(size=(3, layer.A.shape[1])).astype(np.float32)
    asker.adapted.write({})
    assert isinstance(layer.base.weight, Tensor)
    before = layer.base.weight.detach().clone().double().numpy()
    found = uploaded(asker)
    after = layer.base.weight.detach().numpy()
    expected = before + layer.scaling * asker.start[b].astype(np.float64) @ asker.start[a]
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
    assert layer.scaling == asker.config.lora_alpha / 4
    np.testing.assert_array_equal(found["head.weight"], asker.start["head.weight"])
    assert b not in found


def test_layers_of_different_ranks_are_refused_and_the_next_round_is_as_ever(
    make_config: MakeConfig,
) -> None:
    asker = asker_of(make_config(rank=4))
    start, expected = dict(asker.start), uploaded(asker)
    used = rows(asker.config)
    first = next(name for name in start if factor_of(name) == "A")
    broken_ones: list[Arrays] = [
        {**leading(start, 2), first: start[first]},
        {**start, first: start[first][:2]},
        {n: a[:2] if factor_of(n) == "A" else a for n, a in start.items()},
        {**start, first: np.ones(1, np.float32)},
    ]
    for broken in broken_ones:
        asker.start = broken
        assert "OrderRefused" in asker.error(plan="*", server_round=1)
        assert rows(asker.config) == used
    asker.start = start
    again = asker_of(make_config(rank=4))
    again.start = start
    assert equal(uploaded(again), expected)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(make_config: MakeConfig, rank: int) -> None:
    config = make_config(rank=4)
    trainer = process_trainer(config)
    records = trainer.task.client_records(0, config.num_clients)
    ledger = Ledger(state_folder(config) / "ledger.sqlite")
    with pytest.raises(InvalidValue, match="rank"):
        LoRAClient(trainer, records, ledger, "client", "run", rank=rank).fit(
            list(trainer.start.values()), {"plan": "*", "server-round": 1}
        )
    assert rows(config) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_ranks": "2,5"}, "ranks from 1 to rank = 4"),
        ({"client_ranks": "0,2"}, "ranks from 1 to rank = 4"),
        ({"client_ranks": "-1"}, "ranks from 1 to rank = 4"),
        ({"client_ranks": "two"}, "whole numbers"),
        ({"client_ranks": "2.0"}, "whole numbers"),
        ({"strategy": "dp-lora"}, "strategy = 'flexlora'"),
    ],
)
def test_ranks_that_cannot_be_used_are_refused(
    make_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        flex(make_config, **changes)
    assert caught.value.key == "client-ranks"


def test_ranks_go_round(make_config: MakeConfig) -> None:
    config = flex(make_config)
    assert [config.client_rank(client) for client in range(5)] == [2, 4, 1, 2, 4]
