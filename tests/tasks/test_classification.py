from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.classification import evaluate_classifier
from fedlora_flwr.tasks.records import TensorRecords

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
