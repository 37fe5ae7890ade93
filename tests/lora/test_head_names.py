"""A head must have a name by which PEFT finds the head alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import LoRASpec, attach

REFUSED = ("out", "dropout", "A", "B", "default", "base_layer", "lora_A", "t")


class Net(nn.Module):
    """A layer and a head of any name."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head_name = nn.Linear(4, 4), head
        self.add_module(head, nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule(self.head_name)(self.layer(x))
        return logits


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_whose_name_ends_names_of_pefts_own_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(InvalidValue, match=f"Rename {name!r} in the model") as caught:
        attach(Net(name), LoRASpec(2, 4.0, 0.1, "layer", (name,)), seed=0)

    assert caught.value.key == "head"
    assert "PEFT" in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_peft_itself_cannot_train_such_a_head_alone(name: str) -> None:
    """If this fails, PEFT tells such names apart, and the refusal can go."""
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["layer"], modules_to_save=[name])
    try:
        model = get_peft_model(Net(name), config)
    except (TypeError, ValueError):
        return
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    alone = {f"base_model.model.{name}.modules_to_save.default.{p}" for p in ("weight", "bias")}
    assert trained != alone


def test_a_head_that_stays_as_it_was_drawn_is_refused_too() -> None:
    """Its export would not load: PEFT finds modules of a folder in the same way."""
    with pytest.raises(InvalidValue, match="Rename 'out' in the model"):
        attach(Net("out"), LoRASpec(2, 4.0, 0.0, "layer", drawn=("out",)), seed=0)


@pytest.mark.parametrize("name", ["output", "outs", "fc_out", "head"])
def test_a_head_of_another_name_trains(name: str) -> None:
    adapted = attach(Net(name), LoRASpec(2, 4.0, 0.0, "layer", (name,), drawn=(name,)), seed=0)

    trained = [found for found in adapted.layout.names if ".lora_" not in found]
    assert trained == [f"{name}.weight", f"{name}.bias"]
