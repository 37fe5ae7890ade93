"""A client's own model is also measured on the classes that the client has; in simulations only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora_flwr.clients.local_round import LocalRound
from fedlora_flwr.clients.local_store import LocalStore
from fedlora_flwr.clients.own_labels import on_own_labels
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import Records, TensorRecords
from fedlora_flwr.environment import simulating
from fedlora_flwr.privacy.ledger import Ledger
from fedlora_flwr.wire import OWN_LABELS
from fedlora_flwr.wire.order import Order
from tests.conftest import MakeConfig


def labels_of(records: Records) -> Any:
    return records.batch(torch.arange(len(records)))["label"].numpy()


def by_hand(trainer: LocalTrainer, private: Records) -> float:
    """Count record by record: each public one weighs as its class does among the private ones."""
    task, public = trainer.task, trainer.task.test_records()
    said = task.scores(trainer.adapted.model, public).argmax(dim=1).tolist()  # type: ignore[attr-defined]
    truth, own = labels_of(public).tolist(), labels_of(private).tolist()
    weights = [own.count(label) / truth.count(label) for label in truth]
    right = sum(w for w, one, other in zip(weights, said, truth, strict=True) if one == other)
    return float(right / sum(weights))


def only(records: Records, labels: set[int]) -> TensorRecords:
    wanted = [n for n, label in enumerate(labels_of(records)) if int(label) in labels]
    return TensorRecords(dict(records.batch(torch.tensor(wanted))))


@pytest.mark.parametrize("classes", [{3}, {0, 1, 7}, set(range(10))])
def test_a_public_record_weighs_as_its_class_does_at_the_client(
    make_config: MakeConfig, classes: set[int]
) -> None:
    trainer = LocalTrainer.build(make_config())
    task, model = trainer.task, trainer.adapted.model
    private = only(task.client_records(0, 3), classes)
    found = on_own_labels(task, model, task.test_records(), private)
    assert found == {OWN_LABELS: pytest.approx(by_hand(trainer, private), abs=1e-12)}


def test_a_class_without_public_records_is_left_out(make_config: MakeConfig) -> None:
    trainer = LocalTrainer.build(make_config())
    task, model = trainer.task, trainer.adapted.model
    private = task.client_records(0, 3)
    public = only(task.test_records(), set(range(8)))
    both = [on_own_labels(task, model, public, p) for p in (private, only(private, set(range(8))))]
    assert both[0] == pytest.approx(both[1], abs=1e-12)
    # A client that did not tell the figure would be left out of the round's mean.
    plain = task.evaluate(model, public)["accuracy"]
    assert on_own_labels(task, model, public, only(private, {8, 9})) == pytest.approx(
        {OWN_LABELS: plain}
    )


def measured(make_config: MakeConfig, folder: Path, strategy: str) -> dict[str, float]:
    config = make_config(strategy=strategy, local_steps=1)
    trainer = LocalTrainer.build(config)
    store, ledger = LocalStore(folder / "local"), Ledger(folder / "ledger.sqlite")
    private = trainer.task.client_records(0, 3)
    client = LocalRound(trainer, private, ledger, "client", "run", store=store)
    shared = {name: array for name, array in client.start.items() if "lora_A" in name}
    order = Order(server_round=1, plan="*", share="A")
    client.run(order, shared)
    return client.measure(Order(server_round=1, share="A"), shared)


def test_a_simulation_tells_it_and_a_device_does_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with simulating():
        inside = measured(make_config, tmp_path / "simulation", "fedsa-lora")
    outside = measured(make_config, tmp_path / "device", "fedsa-lora")
    assert outside.keys() == {"loss", "accuracy"}
    assert inside.keys() == {*outside, OWN_LABELS}
    assert all(inside[name] == outside[name] for name in outside)
    assert 0 < inside[OWN_LABELS] <= 1
