"""What of Flower's own privacy composes with our strategies: by its real mods and wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from fedlora_flwr.client_app import client_fn
from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.errors import FederationAborted
from fedlora_flwr.integrations.legacy_strategy import LegacyStrategy
from fedlora_flwr.layout import Layout
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import STRATEGIES, FedLoRA, FlexLoRA, FLoRA, LALoRA, RoLoRA
from fedlora_flwr.strategies.replies import to_record
from tests.conftest import MakeConfig
from tests.integrations.support import Counts, Crashes, only
from tests.strategies.tiny import NAMES, Arrays, arrays_of, record_of, start_arrays

PARTIAL = ("ffa-lora", "ffa-seeds", "rolora", "as-lora", "fedsvd", "fedsa-lora")


def app_of(*mods: Any) -> ClientApp:
    """Return clients that move what the plan trains by 10 in each coordinate."""
    app = ClientApp(mods=list(mods))

    @app.train()  # type: ignore[untyped-decorator,unused-ignore]
    def train(message: Message, context: Context) -> Message:
        arrays = arrays_of(message.content.array_records["arrays"])
        plan = ComponentPlan.parse(str(message.content.config_records["config"]["plan"]))
        names = Layout.of(arrays).trained(plan, len(plan.steps))
        content = RecordDict(
            {
                "arrays": record_of({name: arrays[name] + 10 for name in names}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        return Message(content, reply_to=message)

    return app


def run(strategy: Strategy, *mods: Any, num_rounds: int = 1) -> Arrays:
    with LocalGrid(app_of(*mods), 3, {}).running() as grid:
        result = strategy.start(grid, record_of(start_arrays()), num_rounds=num_rounds)
    return arrays_of(result.arrays)


def distance(arrays: Arrays) -> float:
    start = start_arrays()
    return float(np.sqrt(sum(((arrays[name] - start[name]) ** 2).sum() for name in NAMES)))


def fixed(strategy: FedLoRA) -> Strategy:
    return DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, 0.5, 3)


def adaptive(strategy: FedLoRA) -> Strategy:
    return DifferentialPrivacyClientSideAdaptiveClipping(
        strategy, 1e-9, 3, initial_clipping_norm=0.5
    )


CLIPPING = [(fixed, fixedclipping_mod), (adaptive, adaptiveclipping_mod)]


@pytest.mark.parametrize(("wrap", "mod"), CLIPPING)
@pytest.mark.parametrize("strategy", [FedLoRA, LALoRA])
def test_client_side_clipping_bounds_whole_updates(
    wrap: Callable[[FedLoRA], Strategy], mod: Any, strategy: type[FedLoRA]
) -> None:
    assert distance(run(strategy())) > 50
    assert distance(run(wrap(strategy()), mod)) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("wrap", "mod"), CLIPPING)
@pytest.mark.parametrize("name", [*PARTIAL, "flexlora", "flora", "fedex-lora"])
def test_client_side_clipping_is_refused_where_it_cannot_hold(
    name: str, wrap: Callable[[FedLoRA], Strategy], mod: Any
) -> None:
    """Else Flower drops every reply and completes the run with nothing trained."""
    strategy = STRATEGIES[name]
    with pytest.raises(FederationAborted, match=f"does not work on {strategy.__name__}, whose"):
        run(wrap(strategy()), mod)


def test_server_side_clipping_bounds_whole_updates() -> None:
    wrapped = DifferentialPrivacyServerSideFixedClipping(LALoRA(), 0.0, 0.5, 3)
    assert distance(run(wrapped)) == pytest.approx(0.5, rel=1e-3)


def test_server_side_clipping_of_partial_uploads_never_passes() -> None:
    wrapped = DifferentialPrivacyServerSideFixedClipping(RoLoRA(), 0.0, 0.5, 3)
    with pytest.raises(ValueError, match=r"broadcast|zip"):
        run(wrapped)


def test_local_dp_works_on_whole_uploads_and_says_so_on_others() -> None:
    mod = LocalDpMod(0.5, 1e-6, 1e6, 1e-5)
    assert distance(run(FedLoRA(), mod)) == pytest.approx(0.5, rel=0.01)
    with pytest.raises(FederationAborted, match="LocalDpMod expects the keys in the ArrayRecord"):
        run(RoLoRA(), mod)


def serialized(app: ClientApp) -> Callable[[Message, Context], Message]:
    """Give clients messages of their own, as a network does; Flower's mod writes into them."""

    def call(message: Message, context: Context) -> Message:
        own = copy.copy(message)
        own.__dict__ = {**message.__dict__, "_content": copy.deepcopy(message.content)}
        return app(own, context)

    return call


def secure_sum(
    strategy: FedLoRA, grid: LocalGrid, start: Any, num_rounds: int = 1, **options: float
) -> list[Arrays]:
    """Run under SecAgg+; return the arrays of each round."""
    kept: list[Arrays] = []

    def evaluate(_: int, arrays: list[Any], config: Any) -> tuple[float, dict[str, Any]]:
        kept.append(dict(zip(config["array-names"].split(","), arrays, strict=True)))
        return 0.0, {}

    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator,unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        legacy = LegacyStrategy(strategy, start, num_rounds, evaluate)
        inner = LegacyContext(context, ServerConfig(num_rounds), legacy)
        workflow = SecAggPlusWorkflow(3, 2, **options)  # type: ignore[arg-type]
        DefaultWorkflow(fit_workflow=workflow)(grid, inner)

    with grid.running():
        app(grid, grid.context())
    return kept


def counts(make: Any = Counts, count: int = 3, mods: Any = (secaggplus_mod,)) -> LocalGrid:
    def client_fn(context: Context) -> Any:
        return make(int(context.node_config["partition-id"])).to_client()

    return LocalGrid(serialized(ClientApp(client_fn, mods=list(mods))), count, {})


AVERAGING = (
    "dp-lora",
    "ffa-lora",
    "ffa-seeds",
    "rolora",
    "la-lora",
    "as-lora",
    "fedsvd",
    "fedsa-lora",
)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_secure_sum_of_private_clients_is_the_mean(name: str, make_config: MakeConfig) -> None:
    config = make_config(num_clients=3, strategy=name, num_rounds=2)
    start = process_trainer(config).start
    app = ClientApp(client_fn, mods=[secaggplus_mod, bridge])
    strategy = STRATEGIES[name]()
    grid = LocalGrid(serialized(app), 3, config.items())
    *_, first, _ = secure_sum(strategy, grid, start, 2, max_weight=1.0)
    assert strategy.last_round is not None
    assert strategy.last_round.epsilon_max == pytest.approx(8.0, rel=0.01)
    plain = make_config(num_clients=3, strategy=name, num_rounds=2)
    with LocalGrid(ClientApp(client_fn, mods=[bridge]), 3, plain.items()).running() as grid:
        result = STRATEGIES[name]().start(grid, to_record(start), num_rounds=1)
    for array_name, array in result.arrays.items():
        if name == "fedsvd" and "lora" in array_name:
            continue  # Nearly equal products have factors that differ by more.
        np.testing.assert_allclose(first[array_name], array.numpy(), atol=2e-5)


def test_a_secure_sum_weighs_by_examples() -> None:
    start, first = secure_sum(RoLoRA(), counts(), start_arrays(), max_weight=20.0)
    mean = np.average([1, 2, 3], weights=[10, 11, 12])
    np.testing.assert_allclose(first["head.bias"], start["head.bias"] + mean, atol=1e-3)


def test_a_client_that_drops_out_of_a_secure_sum_is_reported() -> None:
    strategy = RoLoRA()
    secure_sum(strategy, counts(only({1}, Crashes), 4), start_arrays())
    report = strategy.last_round
    assert report is not None
    assert (report.sent, len(report.uploads), len(report.failures)) == (4, 3, 1)
    assert report.failures[0].endswith("disk of client 1 is full")


@pytest.mark.parametrize("strategy", [FlexLoRA, FLoRA])
def test_a_secure_sum_is_refused_where_each_upload_is_needed(strategy: type[FedLoRA]) -> None:
    with pytest.raises(FederationAborted, match=f"{strategy.__name__} needs each upload"):
        secure_sum(strategy(), counts(), start_arrays())


def test_a_secure_sum_is_refused_where_its_weights_would_be_others() -> None:
    with pytest.raises(FederationAborted, match="'inverse-noise' would not be used: set 'uniform'"):
        secure_sum(RoLoRA(weighting="inverse-noise"), counts(), start_arrays())


def test_a_halted_secure_sum_ends_the_run() -> None:
    """Flower goes on with the old arrays, and completes."""
    with pytest.raises(FederationAborted, match="Round 1: no upload was handed to the strategy"):
        secure_sum(RoLoRA(), counts(mods=[bridge, secaggplus_mod]), start_arrays())
