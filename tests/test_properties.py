"""What the methods promise together: whole experiments whose outcome is known in advance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import OptimizerSettings
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import (
    ASLoRA,
    FedExLoRA,
    FedLoRA,
    FedSVD,
    FFALoRA,
    FFASeeds,
    FlexLoRA,
    FLoRA,
    LALoRA,
    RoLoRA,
)
from tests.models import VIT, engine_of, values

Array64 = NDArray[np.float64]
M, N, CLIENTS, STEPS, RATE = 6, 8, 3, 5, 0.2
LAYERS = ("blocks.0.fc", "blocks.1.fc")


class Regression:
    """Rank-1 linear regressions, one a block, on data that differ between clients.

    A client's loss is the expectation of ``½|W x - w x|²`` over its own distribution of x, so a
    gradient step is exact. The start of A is almost orthogonal to the truth's row space.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.truth, self.start = {}, {}
        for layer in LAYERS:
            left, right, aside = (_unit(rng.normal(size=size)) for size in (M, N, N))
            aside = _unit(aside - (aside @ right) * right)
            self.truth[layer] = np.outer(left, right)
            bad = 0.1 * right + np.sqrt(1 - 0.01) * aside
            self.start[f"{layer}.lora_A.weight"] = bad[None, :]
            self.start[f"{layer}.lora_B.weight"] = np.zeros((M, 1))
        self.covariances = []
        for _ in range(CLIENTS):
            turn, _ = np.linalg.qr(rng.normal(size=(N, N)))
            self.covariances.append(turn @ np.diag(rng.uniform(0.5, 1.5, N)) @ turn.T)

    def loss(self, arrays: Mapping[str, Array64]) -> float:
        """Return the clients' mean loss, summed over the blocks."""
        total = 0.0
        for layer in LAYERS:
            gap = self.weight(arrays, layer) - self.truth[layer]
            total += sum(float(np.trace(gap @ c @ gap.T)) for c in self.covariances) / 2 / CLIENTS
        return total

    def weight(self, arrays: Mapping[str, Array64], layer: str) -> Array64:
        b, a = f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"
        product = arrays[b] @ arrays[a]
        b, a = f"{layer}.folded_B.weight", f"{layer}.folded_A.weight"
        return product + arrays[b] @ arrays[a] if b in arrays else product

    def floor(self) -> float:
        """Return the least loss that any B reaches with A at its start."""
        mean = np.mean(self.covariances, axis=0)
        arrays = dict(self.start)
        for layer in LAYERS:
            a = self.start[f"{layer}.lora_A.weight"]
            b = self.truth[layer] @ mean @ a.T / (a @ mean @ a.T)
            arrays[f"{layer}.lora_B.weight"] = b
        return self.loss(arrays)

    def app(self) -> ClientApp:
        """Return clients that obey the plan by exact gradient steps."""
        app = ClientApp()

        @app.train()  # type: ignore[untyped-decorator,unused-ignore]
        def train(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            config = message.content.config_records["config"]
            plan = ComponentPlan.parse(str(config["plan"]))
            record = message.content.array_records["arrays"]
            arrays = {n: array.numpy().astype(np.float64) for n, array in record.items()}
            self.train(client, arrays, plan)
            names = Layout.of(arrays).trained(plan, STEPS)
            metrics = MetricRecord({"num-examples": 1})
            content = RecordDict(
                {
                    "arrays": ArrayRecord({n: Array(arrays[n].astype(np.float32)) for n in names}),
                    "metrics": metrics,
                    "config": ConfigRecord({"client": f"client-{client}"}),
                }
            )
            return Message(content, reply_to=message)

        return app

    def train(self, client: int, arrays: dict[str, Array64], plan: ComponentPlan) -> None:
        """Take a round's steps in place."""
        layout = Layout.of(arrays)
        for step in range(1, STEPS + 1):
            gradients: dict[str, Array64] = {}
            for layer in LAYERS:
                b, a = layout.pair(layer)
                gap = self.weight(arrays, layer) - self.truth[layer]
                full = gap @ self.covariances[client]
                gradients[b], gradients[a] = full @ arrays[a].T, arrays[b].T @ full
            for name in layout.active(plan, step):
                arrays[name] = arrays[name] - RATE * gradients[name]

    def run(self, strategy: FedLoRA, rounds: int) -> list[float]:
        """Return the loss before each round and at the end, over the first loss."""
        losses: list[float] = []

        def keep(_: int, arrays: ArrayRecord) -> None:
            found = {n: array.numpy().astype(np.float64) for n, array in arrays.items()}
            losses.append(self.loss(found))

        start = ArrayRecord({n: Array(a.astype(np.float32)) for n, a in self.start.items()})
        with LocalGrid(self.app(), CLIENTS, {}).running() as grid:
            strategy.start(grid, start, rounds, evaluate_fn=keep)
        return [loss / losses[0] for loss in losses]


def _unit(vector: Array64) -> Array64:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float64)


@pytest.fixture(scope="module")
def regression() -> Regression:
    return Regression()


@pytest.mark.parametrize("strategy", [FFALoRA, FedSVD])
def test_a_row_space_that_is_never_trained_is_a_floor(
    strategy: type[FedLoRA], regression: Regression
) -> None:
    losses = regression.run(strategy(), 60)
    floor = regression.floor() / regression.loss(regression.start)
    assert floor > 0.9
    assert floor - 1e-6 < losses[-1] < 1
    assert losses[-1] == pytest.approx(losses[30], rel=1e-3)


def test_each_further_seed_lowers_the_floor(regression: Regression) -> None:
    losses = [regression.run(FFASeeds(seeds=seeds), 60)[-1] for seeds in (1, 3, 6)]
    assert losses[0] == regression.run(FFALoRA(), 60)[-1]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.8 * losses[1]


@pytest.mark.parametrize("strategy", [RoLoRA, ASLoRA, LALoRA, FedLoRA, FlexLoRA, FedExLoRA])
def test_methods_that_train_both_factors_reach_the_truth(
    strategy: type[FedLoRA], regression: Regression
) -> None:
    assert regression.run(strategy(), 120)[-1] < 1e-6


def test_flora_gets_there_by_and_by_from_a_new_random_a_each_round(regression: Regression) -> None:
    losses = regression.run(FLoRA(), 120)
    assert losses[-1] < 1e-2 * losses[30]
    assert losses[30] < 0.2


def test_as_lora_learns_blocks_of_different_need_with_different_factors(
    regression: Regression,
) -> None:
    plans = set()

    class Watched(ASLoRA):
        def plan(self, server_round: int, layout: Layout) -> ComponentPlan:
            plan = super().plan(server_round, layout)
            plans.add(str(plan))
            return plan

    regression.run(Watched(), 60)
    assert plans == {"AA", "AB", "BA", "BB"}


# Noise on both factors at once multiplies; noise on one at a time does not.

STD = 0.7


def noise_steps(plan: str, seed: int) -> list[tuple[Any, Any, Any, Any]]:
    """Take steps of noise alone from A = B = 0; return each step's weights before and after."""
    engine, records, parsed = engine_of(VIT), VIT.records(4), ComponentPlan.parse(plan)
    layer = engine.adapted.layers[0]
    with torch.no_grad():
        layer.A.zero_()
        layer.B.zero_()
    settings = OptimizerSettings("sgd", lr_a=1.0, lr_b=1.0, lr_head=1.0)
    engine.start_round(Mechanism(STD * 2, 1.0, 2, 4), settings, SeededNoise(seed))
    found = []
    for step in (1, 2):
        before = values(engine.adapted)
        names = Layout.of(engine.adapted.parameters).active(parsed, step)
        engine.step(records, torch.tensor([], dtype=torch.int64), names)
        after = values(engine.adapted)
        a, b = f"{layer.name}.lora_A.weight", f"{layer.name}.lora_B.weight"
        found.append((before[a], before[b], after[a] - before[a], after[b] - before[b]))
    return found


def second_order(step: tuple[Any, Any, Any, Any]) -> float:
    """Return the squared norm of what of a step's change of B·A is not linear in its noise."""
    a, b, moved_a, moved_b = step
    change = (b + moved_b) @ (a + moved_a) - b @ a
    return float((change - b @ moved_a - moved_b @ a).square().sum())


def test_joint_noise_multiplies_and_alternating_noise_does_not() -> None:
    seeds, (m, n, r) = range(60), (24, 8, 3)
    joint = np.array([second_order(noise_steps("*", seed)[0]) for seed in seeds])
    expected = m * n * r * STD**4
    assert joint.mean() == pytest.approx(expected, abs=4 * joint.std() / np.sqrt(len(joint)))
    assert joint.std() / np.sqrt(len(joint)) < 0.05 * expected
    for plan in ("B/A", "B", "A"):
        for step in noise_steps(plan, 1):
            assert second_order(step) < 1e-25
            assert any(bool(moved.any()) for moved in step[2:])


def test_joint_noise_moves_a_fresh_model_and_noise_on_b_first_does_not_alone() -> None:
    """A step on A from B = 0 is all noise, and moves nothing; that is why B is first."""
    (a_before, b_before, moved_a, moved_b), _ = noise_steps("A/B", 0)
    assert not moved_b.any()
    assert moved_a.any()
    assert not (b_before @ (a_before + moved_a)).any()
    for method in (FedLoRA, FFALoRA, RoLoRA, LALoRA, ASLoRA, FedSVD, FlexLoRA, FLoRA, FedExLoRA):
        layout = Layout.of([f"{la}.lora_{f}.weight" for la in LAYERS for f in "AB"])
        plan = method().plan(1, layout)
        first = {factor_of(name) for name in layout.active(plan, 1)}
        assert "B" in first, method
