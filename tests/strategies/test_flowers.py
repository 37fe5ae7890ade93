"""Flower's own strategies: what they do here is what they do alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower

from fedlora_flwr.config.keys import fields_by_key
from fedlora_flwr.places import FLOWERS
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedLoRA, strategy_class
from fedlora_flwr.strategies.flowers import FlowersStrategy
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import Arrays, arrays_of, record_of, start_arrays

OWN: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.5},
    "fedavgm": {"server_learning_rate": 0.7, "server_momentum": 0.8},
    "fedadagrad": {"eta": 0.3, "tau": 0.01},
    "fedadam": {"eta": 0.2, "beta_1": 0.8, "beta_2": 0.9},
    "fedyogi": {},
}
FLOWERS_OWN = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadagrad": flower.FedAdagrad,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
}
every_strategy = pytest.mark.parametrize("name", OWN)


def run(strategy: flower.Strategy, rounds: int = 3) -> tuple[Arrays, list[dict[str, Any]]]:
    """Serve clients that move all arrays by a step of their own, and note what they are asked."""
    app, asked = ClientApp(), []

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train(message: Message, context: Context) -> Message:
        (config,), partition = message.content.config_records.values(), context.node_config
        asked.append(dict(config))
        rng = np.random.default_rng(
            (int(partition["partition-id"]), int(str(config["server-round"])))
        )
        arrays = arrays_of(message.content.array_records["arrays"])
        moved = {n: (a + rng.normal(size=a.shape)).astype(np.float32) for n, a in arrays.items()}
        who = ConfigRecord(
            {"client": f"partition-{int(partition['partition-id']):06d}", "status": "ok"}
        )
        numbers = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": record_of(moved), "metrics": numbers, "config": who})
        return Message(content, reply_to=message)

    @app.query()  # type: ignore[untyped-decorator,unused-ignore]
    def query(message: Message, context: Context) -> Message:
        client = f"partition-{int(context.node_config['partition-id']):06d}"
        return Message(RecordDict({"config": ConfigRecord({"client": client})}), reply_to=message)

    with LocalGrid(app, 3, {}).running() as grid:
        result = strategy.start(grid, record_of(start_arrays()), num_rounds=rounds)
    return arrays_of(result.arrays), asked


@every_strategy
def test_it_is_flowers_own_run_but_for_the_order_of_the_sum(name: str) -> None:
    made = strategy_class(name)(**OWN[name])
    found, asked = run(made)
    expected, asked_by_flower = run(FLOWERS_OWN[name](**OWN[name], fraction_evaluate=0.0))
    for array in expected:
        np.testing.assert_allclose(found[array], expected[array], rtol=1e-5, atol=1e-5)
    pulls = [
        {config.get("proximal-mu", 0.0) for config in told} for told in (asked, asked_by_flower)
    ]
    assert pulls[0] == pulls[1] == {OWN[name].get("proximal_mu", 0.0)}
    assert {config["plan"] for config in asked} == {"*"}


def test_each_aggregates_in_its_own_way() -> None:
    finals = [run(strategy_class(name)(**OWN[name]))[0] for name in OWN if name != "fedprox"]
    flat = [np.concatenate([array.ravel() for array in final.values()]) for final in finals]
    assert min(np.abs(a - b).max() for i, a in enumerate(flat) for b in flat[:i]) > 0.05


@every_strategy
def test_settings_and_their_defaults_are_flowers(name: str) -> None:
    made = strategy_class(name)()
    assert isinstance(made, FlowersStrategy)
    own = FLOWERS_OWN[name](fraction_evaluate=0.0)
    settings = read(made)
    assert {key: getattr(own, key) for key in settings} == settings
    assert made.flowers is FLOWERS_OWN[name]


def read(strategy: FedLoRA) -> dict[str, Any]:
    return {e.name: getattr(strategy, e.name) for e in fields_by_key(strategy.settings).values()}


@every_strategy
def test_a_saved_run_continues_bit_for_bit(name: str) -> None:
    assert_goes_on_bit_for_bit(lambda **options: strategy_class(name)(**OWN[name], **options))


def test_all_are_known_by_name() -> None:
    assert list(FLOWERS) == list(OWN)
