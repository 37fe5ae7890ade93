from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fedlora_flwr.data.records import Batch, Records
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.digits import DigitsTask
from tests.tasks.fixtures import settings


def _all(records: Records) -> Batch:
    return records.batch(torch.arange(len(records)))


def _rows(records: Records) -> list[tuple[float, ...]]:
    batch = _all(records)
    labeled = torch.cat([batch["image"].flatten(1), batch["label"].unsqueeze(1)], dim=1)
    return sorted(tuple(row) for row in labeled.tolist())


def test_clients_and_the_test_set_share_out_the_whole_data_set(task: DigitsTask) -> None:
    parts = [_rows(task.client_records(i, 10)) for i in range(10)]
    pictures, labels = load_digits(return_X_y=True)
    expected = sorted((*(p / 16), float(y)) for p, y in zip(pictures, labels, strict=True))

    assert min(map(len, parts)) >= 32
    assert sorted(sum(parts, _rows(task.test_records()))) == expected


def test_the_test_set_is_stratified_and_the_same_for_every_seed(task: DigitsTask) -> None:
    other = DigitsTask(settings(seed=7, partitioner="iid"))

    assert _all(task.test_records())["label"].bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert _rows(other.test_records()) == _rows(task.test_records())


def test_batches_have_the_documented_form(task: DigitsTask) -> None:
    batch = task.client_records(0, 10).batch(torch.tensor([2, 0]))

    assert {name: tensor.shape for name, tensor in batch.items()} == {
        "image": (2, 1, 8, 8),
        "label": (2,),
    }
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)


def test_a_clients_records_are_made_once_per_process(task: DigitsTask) -> None:
    again = DigitsTask(settings())

    assert again.client_records(3, 10) is task.client_records(3, 10)
    assert again.client_records(3, 5) is not task.client_records(3, 10)


@pytest.mark.parametrize("partition_id", [-1, 10])
def test_a_client_that_does_not_exist_is_refused(task: DigitsTask, partition_id: int) -> None:
    with pytest.raises(InvalidValue, match="partition-id"):
        task.client_records(partition_id, 10)


def test_settings_that_cannot_be_met_are_named() -> None:
    with pytest.raises(InvalidValue, match="min-records"):
        DigitsTask(settings(min_records=500)).client_records(0, 10)


def test_the_model_is_bit_identical_each_time_and_draws_nothing(task: DigitsTask) -> None:
    first = task.build_model().state_dict()
    torch.rand(5)
    before = torch.get_rng_state()
    second = task.build_model().state_dict()

    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_printed_digits_teach_something_and_leave_room(task: DigitsTask) -> None:
    accuracy = task.evaluate(task.build_model(), task.test_records())[task.metric]

    assert 0.35 < accuracy < 0.8


def test_targets_and_head_name_modules_of_the_model(task: DigitsTask) -> None:
    names = [name for name, _ in task.build_model().named_modules()]
    targets = [name for name in names if re.fullmatch(task.lora_targets, name)]

    assert targets == [f"blocks.{i}.attn.{part}" for i in range(4) for part in ("qkv", "proj")]
    assert set(task.head) <= set(names)


def test_figures_agree_with_an_independent_computation(task: DigitsTask) -> None:
    model, records = task.build_model().train(), task.client_records(0, 10)
    found = task.evaluate(model, records)

    batch = _all(records)
    with torch.no_grad():
        chances = model.eval().double()(batch["image"].double()).softmax(dim=1)
    right = chances[torch.arange(len(records)), batch["label"]]
    assert found["loss"] == pytest.approx(-right.log().mean().item(), rel=1e-5)
    assert found["accuracy"] == (chances.argmax(1) == batch["label"]).double().mean().item()


def test_evaluation_changes_neither_mode_nor_weights(task: DigitsTask) -> None:
    model = task.build_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task.evaluate(model, task.test_records())

    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_records_loss_reads_that_record_only(task: DigitsTask) -> None:
    model, batch = task.build_model(), task.client_records(0, 10).batch(torch.arange(16))
    losses = task.losses(model, batch)
    others = torch.arange(16) != 5
    changed = {
        "image": torch.where(others.view(-1, 1, 1, 1), 1 - batch["image"], batch["image"]),
        "label": torch.where(others, (batch["label"] + 1) % 10, batch["label"]),
    }

    moved = task.losses(model, changed)

    assert losses.shape == (16,)
    torch.testing.assert_close(moved[5], losses[5])
    assert (moved[others] != losses[others]).all()
    torch.testing.assert_close(
        losses.mean(), F.cross_entropy(model(batch["image"]), batch["label"])
    )
