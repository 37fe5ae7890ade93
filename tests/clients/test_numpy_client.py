from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg, FedProx

from fedlora_flwr.client_app import app, client_fn
from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.numpy_client import LoRAClient
from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import RoLoRA
from fedlora_flwr.strategies.replies import to_record
from tests.clients.asking import Asker
from tests.conftest import MakeConfig


def accuracy(config: RunConfig, arrays: dict[str, Any]) -> float:
    trainer = process_trainer(config)
    trainer.adapted.write(arrays)
    return trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records())["accuracy"]


def learnable(make_config: MakeConfig) -> RunConfig:
    return make_config(epsilon=math.inf, num_clients=2, local_steps=6, batch_size=64)


def test_clients_learn_under_our_strategy(make_config: MakeConfig) -> None:
    config = learnable(make_config)
    start = process_trainer(config).adapted.read()
    with LocalGrid(app, 2, config.items()).running() as grid:
        result = RoLoRA().start(grid, to_record(start), num_rounds=2)
    final = {name: array.numpy() for name, array in result.arrays.items()}
    assert accuracy(config, final) > accuracy(config, start) + 0.05


def test_clients_learn_under_a_stock_strategy(make_config: MakeConfig) -> None:
    config = learnable(make_config)
    start = process_trainer(config).adapted.read()
    with LocalGrid(app, 2, config.items()).running() as grid:
        strategy = FedAvg(fraction_evaluate=0.0)
        result = strategy.start(grid, to_record(start), num_rounds=2)
    final = {name: array.numpy() for name, array in result.arrays.items()}
    assert list(final) == list(start)
    # Without a plan both factors train; A moves once B is no longer zero.
    assert all(not np.array_equal(final[name], start[name]) for name in start)
    assert accuracy(config, final) > accuracy(config, start) + 0.05


def test_a_stock_fedprox_holds_clients_near_the_global_arrays(make_config: MakeConfig) -> None:
    config = make_config(num_clients=2, local_steps=3)
    start, moved = process_trainer(config).adapted.read(), []
    for strategy in (FedAvg(fraction_evaluate=0.0), FedProx(fraction_evaluate=0.0, proximal_mu=1)):
        with LocalGrid(app, 2, config.items()).running() as grid:
            result = strategy.start(grid, to_record(start), num_rounds=1)
        final = {name: array.numpy() for name, array in result.arrays.items()}
        moved.append(sum(float(np.sum((final[n] - start[n]) ** 2)) for n in start))
    free, held = moved
    assert 0 < held < 0.8 * free


class LegacyRun:
    """A project of old: ``server_fn`` and a strategy of ``flwr.server``."""

    def __init__(self, config: RunConfig, num_rounds: int = 1) -> None:
        self.uploads: list[list[Any]] = []
        self.failures: list[Any] = []
        self.start = process_trainer(config).adapted.read()
        run = self

        class Watched(LegacyFedAvg):
            def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
                run.failures.extend(failures)
                ordered = sorted(results, key=lambda pair: pair[0].node_id)
                run.uploads.extend(parameters_to_ndarrays(r.parameters) for _, r in ordered)
                # The same arrays go out again, so that rounds differ by their noise alone.
                return ndarrays_to_parameters(list(run.start.values())), {}

        def server_fn(_: Context) -> ServerAppComponents:
            strategy = Watched(
                fraction_evaluate=0.0,
                initial_parameters=ndarrays_to_parameters(list(run.start.values())),
            )
            return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds))

        with LocalGrid(app, config.num_clients, config.items()).running() as grid:
            cast(Any, ServerApp(server_fn=server_fn))(grid, grid.context())


def test_a_legacy_server_gets_all_arrays_with_both_factors_trained(make_config: MakeConfig) -> None:
    run = LegacyRun(make_config(epsilon=math.inf, num_clients=2, local_steps=3))
    assert not run.failures
    assert len(run.uploads) == 2
    for upload in run.uploads:
        assert len(upload) == len(run.start)
        for (name, before), after in zip(run.start.items(), upload, strict=True):
            assert after.shape == before.shape
            assert not np.array_equal(after, before), name


def test_a_server_that_names_no_round_does_not_get_the_same_noise_twice(
    make_config: MakeConfig,
) -> None:
    run = LegacyRun(make_config(num_clients=2, reproducible=True), num_rounds=2)
    assert not run.failures
    first, other, second, _ = run.uploads
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], other[0])


def test_an_exhausted_client_fails_under_a_server_without_plans(make_config: MakeConfig) -> None:
    run = LegacyRun(make_config(num_clients=2, max_rounds=1), num_rounds=2)
    assert len(run.uploads) == 2
    assert len(run.failures) == 2
    assert all("budget exhausted" in str(failure) for failure in run.failures)


@pytest.mark.parametrize(("plan", "factors"), [("B", "B"), ("A", "A"), ("*", "AB"), ("B/A", "AB")])
def test_only_what_trained_leaves(make_config: MakeConfig, plan: str, factors: str) -> None:
    asker = Asker(make_config(epsilon=math.inf))
    arrays = asker.train(plan).array_records["arrays"]
    assert list(arrays) == [name for name in asker.start if factor_of(name) in (None, *factors)]


def test_one_step_of_an_alternating_plan_uploads_b(make_config: MakeConfig) -> None:
    asker = Asker(make_config(epsilon=math.inf, local_steps=1))
    arrays = asker.train("B/A").array_records["arrays"]
    assert {factor_of(name) for name in arrays} == {"B", None}


def test_the_same_seed_gives_the_same_release(make_config: MakeConfig) -> None:
    def release(server_round: int = 1, **changes: Any) -> list[bytes]:
        content = Asker(make_config(**changes)).train(server_round=server_round)
        return [array.data for array in content.array_records["arrays"].values()]

    assert release() == release()
    assert release() != release(server_round=2)
    assert release(reproducible=False) != release(reproducible=False)


def test_another_backbone_refuses_the_round(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    reason = asker.error(plan="B", server_round=1, fingerprint="0" * 32)
    assert "frozen weights differ" in reason
    assert asker.adapted.fingerprint in reason
    asker.train(fingerprint=asker.adapted.fingerprint)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"plan": "BA"}, "plan = 'BA'"),
        ({"plan": "C"}, "plan = 'C'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    make_config: MakeConfig, settings: dict[str, Any], reason: str
) -> None:
    config = make_config()
    assert reason in Asker(config).error(server_round=1, **settings)
    assert not rows(config)


def test_missing_and_unknown_arrays_are_refused(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    whole = dict(asker.start)
    name = next(iter(whole))
    asker.start = {key: array for key, array in whole.items() if key != name}
    assert name in asker.error(plan="B", server_round=1)
    asker.start = {**whole, "stranger": whole[name]}
    assert "stranger" in asker.error(plan="B", server_round=1)
    asker.start = {**whole, name: whole[name].T}
    assert f"shape of {name}" in asker.error(plan="B", server_round=1)
    assert not rows(asker.config)


def rows(config: RunConfig) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(state_folder(config) / "ledger.sqlite")) as db:
        return db.execute("SELECT client, run, round, steps FROM releases").fetchall()


def test_every_release_is_in_the_ledger(make_config: MakeConfig) -> None:
    asker = Asker(make_config())
    asker.train(server_round=1)
    asker.train(server_round=2)
    run = str(asker.grid.run_id)
    assert rows(asker.config) == [
        ("partition-000000", run, 1, 2),
        ("partition-000000", run, 2, 2),
    ]


def test_a_lost_reply_still_counts(make_config: MakeConfig) -> None:
    def lose(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            raise ConnectionError("the network is down")
        return cast(Message, reply)

    config = make_config(max_rounds=1)
    asker = Asker(config, ClientApp(client_fn, mods=[lose, bridge]))
    assert "the network is down" in asker.error(plan="B", server_round=1)
    assert [row[2] for row in rows(config)] == [1]
    asker = Asker(config, app, asker.grid.run_id)
    assert asker.train().config_records["config"]["status"] == "budget-exhausted"


def test_get_parameters_needs_no_records(make_config: MakeConfig) -> None:
    config = make_config()
    trainer = process_trainer(config)
    records = trainer.task.client_records(0, config.num_clients)
    client = LoRAClient(
        trainer, records, Ledger(state_folder(config) / "ledger.sqlite"), "me", "run"
    )
    start = client.get_parameters({})
    for array, expected in zip(start, trainer.adapted.read().values(), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert not rows(config)


def test_the_short_way_and_flowers_legacy_records_give_the_same_reply(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    replies = [
        Asker(make_config(state_dir=str(tmp_path / name), weighting="size"), client_app).train(
            "B", weighting="size"
        )
        for name, client_app in (("short", app), ("long", ClientApp(client_fn, mods=[bridge])))
    ]

    contents: list[dict[str, dict[str, Any]]] = [
        {kind: dict(record) for kind, record in reply.items()} for reply in replies
    ]
    for content in contents:
        assert set(content) == {"arrays", "metrics", "config"}
        for name in ("seconds", "peak-memory-mb"):
            assert content["metrics"].pop(name) > 0
        content["arrays"] = {name: array.data for name, array in content["arrays"].items()}
    assert contents[0] == contents[1]
    assert list(contents[0]["arrays"]) == list(contents[1]["arrays"])


def test_rates_that_change_need_to_know_the_round(make_config: MakeConfig) -> None:
    asker = Asker(make_config(lr_schedule="exponential:0.5"))

    reason = asker.error(plan="B")

    assert "does not name its round" in reason
    assert "lr-schedule = 'constant'" in reason
    asker.train("B", 1)
