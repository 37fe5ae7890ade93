"""Models of which a part stays with each client: what travels, and whose figures are reported."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from safetensors.numpy import load_file

from fedlora_flwr.client_app import client_fn
from fedlora_flwr.clients.bridge import bridge
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.trainer import LocalTrainer, process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.config.state import state_folder
from fedlora_flwr.errors import FedLoRAError, InvalidValue
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.serve import run_federation
from fedlora_flwr.simulations.local_grid import LocalGrid
from fedlora_flwr.strategies import FedSALoRA
from fedlora_flwr.strategies.replies import to_record
from fedlora_flwr.wire import OWN_LABELS
from tests.conftest import MakeConfig
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import NAMES


class Wire:
    """A client mod on the outside of the bridge: it sees what really travels."""

    def __init__(self, fails: Mapping[str, set[int]] | None = None) -> None:
        self.down: list[tuple[str, dict[str, Any]]] = []
        self.up: list[tuple[str, dict[str, Any]]] = []
        self.metrics: dict[str, list[dict[str, Any]]] = {"train": [], "evaluate": []}
        self._fails = fails or {}

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type
        self.down.append((kind, arrays_in(message)))
        if int(context.node_config["partition-id"]) in self._fails.get(kind, set()):
            raise ConnectionError("gone")
        reply = call_next(message, context)
        if not reply.has_error() and kind in self.metrics:
            self.up.append((kind, arrays_in(reply)))
            self.metrics[kind].append(dict(reply.content.metric_records["metrics"]))
        return reply


def arrays_in(message: Message) -> dict[str, Any]:
    return {n: a.numpy() for r in message.content.array_records.values() for n, a in r.items()}


class Shuffled(LocalGrid):
    """Answers in any order."""

    seed = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        random.Random(self.seed).shuffle(replies)
        self.seed += 1
        return replies


def fedsa(make_config: MakeConfig, **changes: Any) -> RunConfig:
    return make_config(**{"strategy": "fedsa-lora", **changes})


def run(
    config: RunConfig, folder: Path, wire: Wire | None = None, seed: int = 0
) -> tuple[RunDirectory, dict[str, Any], str]:
    run_dir = RunDirectory(folder)
    app = ClientApp(client_fn, mods=[wire or Wire(), bridge])
    with Shuffled(app, config.num_clients, config.items()).running() as grid:
        assert isinstance(grid, Shuffled)
        grid.seed = seed
        return run_dir, run_federation(grid, config, run_dir), str(grid.run_id)


def personal_metrics(config: RunConfig, run_id: str, shared: Mapping[str, Any]) -> list[Any]:
    """Evaluate each client's model on the public test set, put together by hand."""
    trainer = LocalTrainer.build(config)
    store, found = LocalStore(state_folder(config) / "local"), []
    for client in range(config.num_clients):
        local = store.recall(f"partition-{client:06d}", run_id)
        assert {factor_of(name) for name in local} == {"B", None}
        trainer.adapted.write({**trainer.start, **shared, **local})
        found.append(trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records()))
    return found


def exported(run_dir: RunDirectory) -> dict[str, Any]:
    arrays = load_file(run_dir.adapter / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): array for name, array in arrays.items()}


def test_only_a_is_on_the_wire_in_either_direction(make_config: MakeConfig, tmp_path: Path) -> None:
    wire, config = Wire(), fedsa(make_config)
    run_dir, _, _ = run(config, tmp_path / "run", wire)
    names = {n for n in process_trainer(config).start if factor_of(n) == "A"}
    assert [kind for kind, _ in wire.down].count("train") == 6
    assert [kind for kind, _ in wire.down].count("evaluate") == 6
    for kind, arrays in wire.down:
        assert set(arrays) == (names if kind in ("train", "evaluate") else set())
    for kind, arrays in wire.up:
        assert set(arrays) == (names if kind == "train" else set())
    # What an evaluation got is the mean of what training sent.
    train = [arrays for kind, arrays in wire.up if kind == "train"][-3:]
    (*_, last) = [arrays for kind, arrays in wire.down if kind == "evaluate"]
    for name in names:
        mean = np.mean([arrays[name] for arrays in train], axis=0, dtype=np.float64)
        np.testing.assert_allclose(last[name], mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(exported(run_dir)[name], last[name])


def test_the_figures_of_a_round_are_the_means_of_the_clients_own(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    wire, config = Wire(), fedsa(make_config, lr_b=1.0)
    run_dir, summary, run_id = run(config, tmp_path / "run", wire)
    rows = run_dir.rows("rounds")
    shared = {n: a for n, a in exported(run_dir).items() if factor_of(n) == "A"}
    metrics = personal_metrics(config, run_id, shared)
    for key in ("accuracy", "loss"):
        values = [entry[key] for entry in metrics]
        assert len(set(values)) > 1
        assert rows[-1][key] == pytest.approx(np.mean(values), rel=1e-9)
        first = [entry[key] for entry in wire.metrics["evaluate"][:3]]
        assert rows[1][key] == pytest.approx(np.mean(first), rel=1e-12)
    assert summary["final_accuracy"] == rows[-1]["accuracy"]
    own = [entry[OWN_LABELS] for entry in wire.metrics["evaluate"][-3:]]
    assert summary[f"final_{OWN_LABELS}"] == pytest.approx(np.mean(own), rel=1e-12)
    assert f"initial_{OWN_LABELS}" not in summary
    # Not those of a model that the server could have had.
    trainer = LocalTrainer.build(config)
    trainer.adapted.write({**trainer.start, **shared})
    bare = trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records())
    assert rows[0]["accuracy"] == summary["initial_accuracy"] == bare["accuracy"]
    assert rows[-1]["loss"] != bare["loss"]


def test_the_order_of_replies_does_not_matter(make_config: MakeConfig, tmp_path: Path) -> None:
    config, seen = fedsa(make_config, num_clients=5, num_rounds=2), set()
    for seed in range(3):
        run_dir, _, _ = run(config, tmp_path / str(seed), seed=10 * seed)
        rows = [(row["accuracy"], row["loss"]) for row in run_dir.rows("rounds")]
        bits = (run_dir.adapter / "adapter_model.safetensors").read_bytes()
        seen.add((str(rows), bits))
    assert len(seen) == 1


def test_bytes_are_those_of_all_messages(make_config: MakeConfig, tmp_path: Path) -> None:
    config = fedsa(make_config)
    run_dir, summary, _ = run(config, tmp_path / "run")
    start = to_record(process_trainer(config).start)
    of_a = sum(len(array.data) for name, array in start.items() if factor_of(name) == "A")
    whole = sum(len(array.data) for array in start.values())
    for row in run_dir.rows("rounds")[1:]:
        assert (row["bytes_up"], row["bytes_down"]) == (3 * of_a, 2 * 3 * of_a)
        assert row["bytes_up_adapters"] == row["bytes_up"]
        # Plain averaging sends everything down and up once, and measures on the server.
        assert row["bytes_plain"] == 3 * 2 * whole
    assert summary["bytes_up"] + summary["bytes_down"] < summary["bytes_plain"]


def test_the_rows_and_what_is_left_on_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    config = fedsa(make_config)
    run_dir, summary, _ = run(config, tmp_path / "run")
    assert [row["plan"] for row in run_dir.rows("rounds")[1:]] == ["*", "*"]
    assert not any(row["failures"] or row["declined"] for row in run_dir.rows("rounds")[1:])
    assert len(run_dir.rows("clients")) == 6
    assert all(0 < row["epsilon"] <= config.epsilon for row in run_dir.rows("clients"))
    assert not any("accuracy" in key for row in run_dir.rows("clients") for key in row)
    assert (
        len(list((state_folder(config) / "local").iterdir())) == 6
    )  # Two rounds of three clients.
    # The server's adapter is the backbone's start with the new A.
    start = process_trainer(config).start
    for name, array in exported(run_dir).items():
        assert np.array_equal(array, start[name]) == (factor_of(name) != "A"), name
    assert summary["status"] == "completed"


def test_a_cohort_measures_itself(make_config: MakeConfig, tmp_path: Path) -> None:
    wire = Wire()
    config = fedsa(make_config, num_clients=4, fraction_train=0.5, num_rounds=3)
    run(config, tmp_path / "run", wire)
    kinds = [kind for kind, _ in wire.down if kind != "query"]
    assert kinds == ["train", "train", "evaluate", "evaluate"] * 3


def test_a_client_that_cannot_be_measured_is_left_out_and_named(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    wire, config = Wire({"evaluate": {1}}), fedsa(make_config, num_rounds=1)
    run_dir, _, _ = run(config, tmp_path / "run", wire)
    row = run_dir.rows("rounds")[1]
    answered = [entry["accuracy"] for entry in wire.metrics["evaluate"]]
    assert len(answered) == 2
    assert row["accuracy"] == pytest.approx(np.mean(answered))
    assert any("partition-000001" in line and "gone" in line for line in row["failures"])


def test_a_model_without_any_b_never_stands_in_for_the_clients(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """With no client's figures, those of the server's B = 0 would look like a training failure."""
    wire, config = Wire({"evaluate": {0, 1, 2}}), fedsa(make_config, num_rounds=1)
    try:
        run_dir, _, _ = run(config, tmp_path / "run", wire)
    except FedLoRAError:
        return
    rows = run_dir.rows("rounds")
    assert len(rows) == 2
    assert rows[1].get("accuracy") is None


def test_budgets_that_are_spent_do_not_stop_the_figures(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # Client 0 fails in training, so it has no B of its own and measures the backbone's.
    wire, config = Wire({"train": {0}}), fedsa(make_config, num_rounds=1)
    run_dir, _, run_id = run(config, tmp_path / "run", wire)
    row = run_dir.rows("rounds")[1]
    assert row["clients_used"] == 2
    assert len(wire.metrics["evaluate"]) == 3
    shared = {n: a for n, a in exported(run_dir).items() if factor_of(n) == "A"}
    trainer, losses = LocalTrainer.build(config), []
    for client in range(3):
        local = LocalStore(state_folder(config) / "local").recall(f"partition-{client:06d}", run_id)
        assert bool(local) == (client != 0)
        trainer.adapted.write({**trainer.start, **shared, **local})
        test = trainer.task.test_records()
        losses.append(trainer.task.evaluate(trainer.adapted.model, test)["loss"])
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_plan_trains_both_factors() -> None:
    assert str(FedSALoRA().plan(1, Layout.of(NAMES))) == "*"


@pytest.mark.parametrize("strategy", ["la-lora", "rolora", "fedsvd"])
def test_a_head_that_is_not_shared_stays_with_its_client(
    make_config: MakeConfig, tmp_path: Path, strategy: str
) -> None:
    wire, config = Wire(), make_config(strategy=strategy, share_head=False)

    _, summary, run_id = run(config, tmp_path / "run", wire)

    traveled = {name for _, arrays in (*wire.down, *wire.up) for name in arrays}
    assert traveled
    assert all(factor_of(name) for name in traveled)
    # Every client's figures are those of the last factors with its own head.
    (*_, shared) = [arrays for kind, arrays in wire.down if kind == "evaluate"]
    trainer, heads, found = LocalTrainer.build(config), [], []
    store = LocalStore(state_folder(config) / "local")
    for client in range(config.num_clients):
        local = store.recall(f"partition-{client:06d}", run_id)
        assert {factor_of(name) for name in local} == {None}
        heads.append(local["head.weight"])
        trainer.adapted.write({**trainer.start, **shared, **local})
        found.append(trainer.task.evaluate(trainer.adapted.model, trainer.task.test_records()))
    assert not np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], trainer.start["head.weight"])
    expected = np.mean([figures["accuracy"] for figures in found])
    assert summary["final_accuracy"] == pytest.approx(expected)


def test_a_head_that_does_not_train_cannot_stay(make_config: MakeConfig) -> None:
    with pytest.raises(InvalidValue, match="share-head"):
        make_config(share_head=False, train_head=False)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    assert_goes_on_bit_for_bit(FedSALoRA)
