from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.evaluation import evaluate_classifier, in_order_of_length

RECORDS = TensorRecords(
    {"x": torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), "label": torch.tensor([0, 1, 1])}
)


def _identity() -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 3, 512])
def test_hand_computed_figures_do_not_depend_on_the_batch(batch_size: int) -> None:
    model = _identity()

    found = evaluate_classifier(model, RECORDS, lambda batch: model(batch["x"]), batch_size)

    # -log softmax of two logits is log(1 + exp(-(right - wrong))).
    margins = torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64)
    assert found["loss"] == pytest.approx(torch.log1p(torch.exp(-margins)).mean().item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_each_module_gets_its_own_mode_back_even_after_a_failure() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    model.train()
    model[1].eval()

    def logits(batch: object) -> torch.Tensor:
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        evaluate_classifier(model, RECORDS, logits)

    assert [module.training for module in model.modules()] == [True, True, False]


def test_nothing_to_evaluate_is_refused() -> None:
    empty = TensorRecords({"x": torch.zeros(0, 2), "label": torch.zeros(0, dtype=torch.int64)})
    model = _identity()

    with pytest.raises(InvalidValue, match="records"):
        evaluate_classifier(model, empty, lambda batch: model(batch["x"]))


def _parted(*numbers: int) -> TensorRecords:
    tensors = RECORDS.batch(torch.arange(3))
    return TensorRecords({**tensors, "part": torch.tensor(numbers)})


@pytest.mark.parametrize("batch_size", [1, 2, 512])
def test_parts_are_measured_by_themselves(batch_size: int) -> None:
    model = _identity()
    found, alone = (
        evaluate_classifier(model, records, lambda batch: model(batch["x"]), batch_size, parts)
        for records, parts in ((_parted(1, 0, 1), ("a", "b", "none")), (_parted(0, 0, 0), ("a",)))
    )
    losses = torch.log1p(torch.exp(-torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64)))
    assert set(found) == {"loss", "accuracy", "loss_a", "accuracy_a", "loss_b", "accuracy_b"}
    assert found["loss_a"] == pytest.approx(losses[1].item(), rel=1e-6)
    assert found["loss_b"] == pytest.approx((losses[0] + losses[2]).item() / 2, rel=1e-6)
    assert (found["accuracy_a"], found["accuracy_b"]) == (1.0, 0.5)
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert set(alone) == {"loss", "accuracy"}


def test_records_of_no_part_are_of_none() -> None:
    model = _identity()
    found = evaluate_classifier(model, RECORDS, lambda batch: model(batch["x"]), 2, ("a", "b"))
    assert set(found) == {"loss", "accuracy"}


class Lengthy(TensorRecords):
    """Records that say how long they are."""

    lengths: NDArray[np.int64]


def test_records_of_like_length_are_measured_together() -> None:
    records = Lengthy(RECORDS.batch(torch.arange(3)))
    records.lengths = np.array([7, 2, 7])
    model, seen = _identity(), []

    def logits(batch: object) -> torch.Tensor:
        seen.append(batch["label"].tolist())  # type: ignore[index]
        return model(batch["x"])  # type: ignore[no-any-return,index]

    found = evaluate_classifier(model, records, logits, 1)

    assert in_order_of_length(records).tolist() == [1, 0, 2]
    assert in_order_of_length(RECORDS).tolist() == [0, 1, 2]
    assert seen == [[1], [0], [1]]
    assert found == evaluate_classifier(model, RECORDS, lambda batch: model(batch["x"]))
