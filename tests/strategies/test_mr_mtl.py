"""MR-MTL: each client keeps its own model, and its noisy steps are pulled to the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from fedlora_flwr.client_app import client_fn
from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.postprocessing.filters import NoFilter
from fedlora_flwr.server.norm_bound import check_known
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import MRMTL
from fedlora_flwr.wire.order import Order
from tests.conftest import MakeConfig
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import plans

Arrays = dict[str, Any]
PULL, RATE = 0.5, 0.2


class Wire:
    """A client mod that keeps what each client got and sent in each round."""

    def __init__(self) -> None:
        self.down: dict[tuple[int, int], Arrays] = {}
        self.up: dict[tuple[int, int], Arrays] = {}

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type != "train":
            return call_next(message, context)
        key = int(str(message.content.config_records["config"]["server-round"])), client
        self.down[key] = arrays_in(message)
        reply = call_next(message, context)
        self.up[key] = arrays_in(reply)
        return reply


def arrays_in(message: Message) -> Arrays:
    return {n: a.numpy() for r in message.content.array_records.values() for n, a in r.items()}


class Finished:
    """A real run of two rounds with noise."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.wire, self.run_dir = config, Wire(), RunDirectory(folder)
        app = ClientApp(client_fn, mods=[self.wire, bridge])
        with LocalGrid(app, config.num_clients, config.items()).running() as grid:
            self.run_id = str(grid.run_id)
            run_federation(grid, config, self.run_dir)

    def kept(self, client: int, before: int | None = None) -> Arrays:
        store = LocalStore(state_folder(self.config) / "local")
        return store.recall(f"partition-{client:06d}", self.run_id, before)


def test_plans_by_round() -> None:
    assert plans(MRMTL(), rounds=3) == ["B"] * 3


def test_the_order_names_the_own_start_and_the_pull_and_measures_without_one() -> None:
    strategy = MRMTL(pull=2)
    assert strategy.order(3, "B").to_config() == {
        "server-round": 3, "plan": "B", "start-from": "own", "proximal-mu": 2.0
    }  # fmt: skip
    assert strategy.order(3) == Order(3, start_from="own")


def test_clients_start_from_their_own_models_and_are_pulled_to_the_mean(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    options = {"mr-mtl.pull": PULL}
    config = RunConfig.of({**make_config(strategy="mr-mtl").items(), **options})
    found = Finished(config, tmp_path / "run")
    trainer = LocalTrainer.build(config)
    means, figures = [], []
    for client in range(config.num_clients):
        first, second = found.wire.up[1, client], found.wire.up[2, client]
        assert {factor_of(name) for name in first} == {"B", None}
        # A client keeps the bits that it has released, and nothing else.
        for kept, sent in ((found.kept(client, 2), first), (found.kept(client), second)):
            assert kept.keys() == sent.keys()
            assert all(np.array_equal(kept[name], array) for name, array in sent.items())
        # Its second round is the private step from its own model, pulled to the server's arrays.
        records = trainer.task.client_records(client, config.num_clients)
        mechanism = calibrated_mechanism(config, len(records))
        about = ComponentPlan.parse("B"), records, mechanism, (f"partition-{client:06d}", 2)
        again = trainer.train(
            found.wire.down[2, client], *about, server_round=2, proximal_mu=PULL, own=first
        )
        assert all(np.array_equal(again.arrays[name], array) for name, array in second.items())
        means.append(first)
        trainer.load({**found.wire.down[2, client], **second})
        figures.append(trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records()))
    for name in means[0]:
        mean = np.mean([arrays[name] for arrays in means], axis=0, dtype=np.float64)
        np.testing.assert_allclose(found.wire.down[2, 0][name], mean, rtol=1e-5, atol=1e-7)
    losses = [entry["loss"] for entry in figures]
    assert len(set(losses)) == len(losses)
    assert found.run_dir.rows("rounds")[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-9)


class Recorded(NoFilter):
    """Keeps the noisy gradients as they are before the pull."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray[Any, Any]] = []

    def __call__(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        self.seen.append(grad.detach().double().numpy().copy())
        return grad


def stepped(pull: float, steps: int) -> tuple[list[Any], Any, Any, Any]:
    """Take private steps on B from an own start; return gradients, start, center and end."""
    torch.manual_seed(0)
    spec = LoRASpec(rank=2, alpha=2.0, dropout=0.0, targets="0")
    adapted = attach(nn.Sequential(nn.Linear(4, 3)), spec, seed=1)
    engine = PrivateEngine(adapted, lambda model, batch: model(batch["x"]).square().sum(1))
    b, rng, recorded = "0.lora_B.weight", np.random.default_rng(3), Recorded()
    start, center = rng.normal(size=(2, 3, 2)).astype(np.float32)
    settings = OptimizerSettings("sgd", RATE, RATE, RATE, proximal_mu=pull)
    adapted.write({b: center})
    engine.start_round(Mechanism(1.0, 0.5, 4, 16), settings, SeededNoise(5), recorded)
    adapted.write({b: start})
    records = TensorRecords({"x": torch.linspace(-1, 1, 64).reshape(16, 4)})
    for step in range(steps):
        engine.step(records, torch.arange(step, step + 4), [b])
    return recorded.seen, start, center, adapted.read()[b]


@pytest.mark.parametrize("pull", [0.0, 0.3, 4.0])
def test_steps_follow_the_closed_form_of_noisy_gradients_and_a_pull_outside_the_clip(
    pull: float,
) -> None:
    """With c = 1 - ηλ: w_K - w̄ = c^K (w_0 - w̄) - η Σ c^(K-1-j) g_j."""
    steps, keep = 5, 1 - RATE * pull
    gradients, start, center, end = stepped(pull, steps)
    expected = center + keep**steps * (start.astype(float) - center)
    for number, gradient in enumerate(gradients):
        expected = expected - RATE * keep ** (steps - 1 - number) * gradient
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-5)
    # The pull has no part in what is clipped and noised.
    unpulled, *_ = stepped(0.0, 1)
    np.testing.assert_array_equal(gradients[0], unpulled[0])


def test_the_norm_bound_is_refused_and_auto_goes_without(make_config: MakeConfig) -> None:
    config = make_config(strategy="mr-mtl", largest_noise=3.0)
    check_known(config)
    with pytest.raises(InvalidValue, match="start from models of their own"):
        check_known(RunConfig.of({**config.items(), "robust": "norm-bound"}))


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(MRMTL)


def test_a_step_starts_from_the_own_model_and_is_pulled_to_the_message(
    make_config: MakeConfig,
) -> None:
    config = make_config(strategy="mr-mtl", local_steps=1)
    trainer = LocalTrainer.build(config)
    records = trainer.task.client_records(0, config.num_clients)
    about = ComponentPlan.parse("B"), records, Mechanism(1.0, 1.0, 16, len(records)), ("client", 1)
    center, rng = trainer.start, np.random.default_rng(0)
    own = {
        name: array + rng.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in center.items()
        if factor_of(name) != "A"
    }
    free = trainer.train({**center, **own}, *about).arrays
    pulled = trainer.train(center, *about, proximal_mu=PULL, own=own).arrays
    _, of_b, of_head = config.learning_rates(1)
    for name, array in own.items():
        pull = (of_b if factor_of(name) else of_head) * PULL * (array - center[name])
        np.testing.assert_allclose(pulled[name], free[name] - pull, rtol=0, atol=1e-5)
