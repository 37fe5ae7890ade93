from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from numpy.typing import NDArray

from fedlora_flwr.client_app import app as package_app
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.integrations.legacy_strategy import LegacyStrategy
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import STRATEGIES, FedLoRA, FFALoRA, RoLoRA
from fedlora_flwr.strategies.replies import to_record
from tests.conftest import MakeConfig
from tests.integrations.support import Counts, Crashes, Metrics, only
from tests.strategies.tiny import A_NAMES, B_NAMES, NAMES, Arrays, start_arrays


class Kept:
    """A legacy run, and what its evaluation saw in each round."""

    def __init__(self) -> None:
        self.rounds: list[Arrays] = []
        self.history: Any = None

    def run(
        self,
        strategy: FedLoRA,
        start: Mapping[str, NDArray[Any]],
        grid: LocalGrid,
        num_rounds: int = 1,
    ) -> Kept:
        def evaluate(server_round: int, arrays: list[Any], config: Any) -> tuple[float, Metrics]:
            assert server_round == len(self.rounds)
            names = str(config["array-names"]).split(",")
            self.rounds.append(dict(zip(names, arrays, strict=True)))
            return 0.5, {}

        def server_fn(_: Context) -> ServerAppComponents:
            legacy = LegacyStrategy(strategy, start, num_rounds, evaluate)
            return ServerAppComponents(strategy=legacy, config=ServerConfig(num_rounds))

        with grid.running():
            cast(Any, ServerApp(server_fn=server_fn))(grid, grid.context())
        assert strategy.num_rounds == num_rounds
        return self


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_legacy_run_equals_the_run_without_the_wrapper_bit_for_bit(
    name: str, make_config: MakeConfig
) -> None:
    """Two clients of ours, whose sums do not depend on their order."""
    config = make_config(num_clients=2, strategy=name, num_rounds=3)
    start = process_trainer(config).start
    kept = Kept().run(
        STRATEGIES[name](), start, LocalGrid(package_app, 2, config.items()), num_rounds=3
    )
    other = make_config(num_clients=2, strategy=name, num_rounds=3)
    with LocalGrid(package_app, 2, other.items()).running() as grid:
        result = STRATEGIES[name]().start(grid, to_record(start), num_rounds=3)
    final = kept.rounds[-1]
    assert list(final) == list(result.arrays)
    for array_name, array in result.arrays.items():
        np.testing.assert_array_equal(final[array_name], array.numpy(), err_msg=array_name)


def grid_of(client: Callable[[int], NumPyClient], count: int = 3) -> LocalGrid:
    def client_fn(context: Context) -> Any:
        return client(int(context.node_config["partition-id"])).to_client()

    return LocalGrid(ClientApp(client_fn), count, {})


def run(
    strategy: FedLoRA, client: Callable[[int], NumPyClient], num_rounds: int = 1, count: int = 3
) -> Kept:
    return Kept().run(strategy, start_arrays(), grid_of(client, count), num_rounds)


class IgnoresThePlan(Counts):
    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> Any:
        return [array + 1 for array in parameters], 1, {}


class DropsAnArray(Counts):
    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> Any:
        return parameters[1:], 1, {}


class ForgetsItsLedger(Counts):
    def fit(self, parameters: list[Any], config: Mapping[str, Any]) -> Any:
        arrays, examples, metrics = super().fit(parameters, config)
        return arrays, examples, {**metrics, "steps": 5, "epsilon": 1.0}


def test_uploads_are_merged_into_the_last_global_arrays() -> None:
    kept = run(RoLoRA(), Counts, num_rounds=2)
    start, first, second = kept.rounds
    for name in NAMES:
        rounds = 2 if name == "head.bias" else 1
        np.testing.assert_allclose(second[name], start[name] + 2 * rounds, rtol=1e-6)
    for name in A_NAMES:
        np.testing.assert_array_equal(first[name], start[name])
    for name in B_NAMES:
        np.testing.assert_array_equal(second[name], first[name])


def test_weights_by_size_are_the_numbers_of_examples() -> None:
    strategy = FFALoRA(weighting="size")
    start, first = run(strategy, Counts).rounds
    mean = np.average([1, 2, 3], weights=[10, 11, 12])
    np.testing.assert_allclose(first["head.bias"], start["head.bias"] + mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Crashes, "disk of client 1 is full"),
        (IgnoresThePlan, "those that B trains; wrong: .*blocks.0.fc.lora_A.weight"),
        (DropsAnArray, "uploaded arrays = 4 cannot be used: expected one for each of 5 names"),
    ],
)
def test_a_bad_client_is_named_with_its_reason_and_the_others_go_on(
    bad: type[NumPyClient], reason: str
) -> None:
    strategy = RoLoRA()
    start, first = run(strategy, only({1}, bad)).rounds
    report = strategy.last_round
    assert report is not None
    assert (report.sent, len(report.uploads), len(report.failures)) == (3, 2, 1)
    assert re.match(r"node \d{20}: .*" + reason, report.failures[0])
    np.testing.assert_allclose(first["head.bias"], start["head.bias"] + 2, rtol=1e-6)


def test_too_few_answers_abort_with_all_reasons() -> None:
    with pytest.raises(FederationAborted) as caught:
        run(RoLoRA(min_completion=0.5), only({0, 2}, Crashes))
    message = str(caught.value)
    assert "Round 1: 1 of 3 clients answered, fewer than min-completion = 0.5" in message
    assert "disk of client 0 is full" in message
    assert "disk of client 2 is full" in message


def test_a_ledger_that_counts_no_further_is_refused() -> None:
    with pytest.raises(FederationAborted, match="counts 5 private steps after 5 in an earlier"):
        run(RoLoRA(), ForgetsItsLedger, num_rounds=2)


def test_a_spent_budget_is_no_failure(make_config: MakeConfig) -> None:
    config = make_config(num_clients=2, max_rounds=1)
    start = process_trainer(config).start
    strategy = RoLoRA()
    grid = LocalGrid(package_app, 2, config.items())
    kept = Kept().run(strategy, start, grid, num_rounds=3)
    # Both decline in the second round, and in the third nobody is asked.
    report = strategy.last_round
    assert report is not None
    assert (report.server_round, len(report.declined), report.failures) == (2, 2, [])
    for name, array in kept.rounds[1].items():
        np.testing.assert_array_equal(kept.rounds[2][name], array)
        np.testing.assert_array_equal(kept.rounds[3][name], array)


def test_a_cap_spares_clients_the_question(make_config: MakeConfig) -> None:
    strategy = RoLoRA(max_rounds=1, fraction_train=0.5, min_train_nodes=1)
    kept = run(strategy, Counts, num_rounds=6, count=4)
    report = strategy.last_round
    assert report is not None
    assert (report.server_round, report.declined) == (2, [])
    np.testing.assert_array_equal(kept.rounds[6]["head.bias"], kept.rounds[2]["head.bias"])


def test_a_cohort_is_the_one_that_the_strategy_draws(make_config: MakeConfig) -> None:
    config = make_config(num_clients=4, epsilon=math.inf)
    start = process_trainer(config).start

    def cohorts() -> list[str]:
        strategy = RoLoRA(fraction_train=0.5, seed=3)
        Kept().run(strategy, start, LocalGrid(package_app, 4, config.items()))
        assert strategy.last_round is not None
        return [upload.client for upload in strategy.last_round.uploads]

    first = cohorts()
    assert len(first) == 2
    assert all(client.startswith("partition-") for client in first)
    assert cohorts() == first


def test_clients_evaluate_where_the_strategy_asks() -> None:
    legacy: list[tuple[float | None, Any]] = []

    class Watched(LegacyStrategy):
        def aggregate_evaluate(self, *args: Any) -> Any:
            legacy.append(super().aggregate_evaluate(*args))
            return legacy[-1]

    def server_fn(_: Context) -> ServerAppComponents:
        strategy = Watched(RoLoRA(fraction_evaluate=1.0), start_arrays(), 1)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(1))

    with grid_of(Counts).running() as grid:
        cast(Any, ServerApp(server_fn=server_fn))(grid, grid.context())
    loss, metrics = legacy[0]
    assert loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert metrics["accuracy"] == pytest.approx(0.25)


def test_a_strategy_serves_one_run() -> None:
    strategy = RoLoRA()
    run(strategy, Counts)
    with pytest.raises(InvalidValue, match="a new one for each run"):
        LegacyStrategy(strategy, start_arrays(), 1)


def test_num_rounds_below_one_are_refused() -> None:
    with pytest.raises(InvalidValue, match="num_rounds = 0"):
        LegacyStrategy(RoLoRA(), start_arrays(), 0)
