"""Gradient checkpointing: the same private steps with fewer activations in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.lora.gradient_checkpointing import checkpoint_gradients
from fedlora_flwr.lora.precision import run_in_bf16
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.masks import own_randomness
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.models import FAMILIES, LLAMA, ROBERTA, VIT, Family, active, update

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
NOISY = Mechanism(1.0, 0.5, 6, 12)


def adapted_of(family: Family, *, again: bool, dropout: float = 0.0, bf16: bool = False) -> Any:
    adapted = family.adapted(dropout)
    if family is LLAMA:
        adapted.model.get_base_model().config.use_cache = False  # As the package's tasks do.
    if bf16:
        adapted.model.float()
    if again:
        checkpoint_gradients(adapted)
    if bf16:
        run_in_bf16(adapted.model)
    return adapted


def with_dropout(adapted: AdaptedModel) -> AdaptedModel:
    for module in adapted.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return adapted


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Count what the forward pass keeps for the backward pass."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    assert any(bool(value.any()) for value in expected.values())


@every_family
def test_noisy_steps_have_the_same_bits(family: Family) -> None:
    steps = []
    for again in (False, True):
        adapted = with_dropout(adapted_of(family, again=again, dropout=0.1))
        engine, records = PrivateEngine(adapted, family.losses, 4), family.records(12)
        engine.verify(records)
        with own_randomness(5):
            steps.append(update(engine, records, range(9), "*", NOISY))
    assert_bits(steps[1], steps[0])


@every_family
def test_each_records_gradient_has_the_same_bits(family: Family) -> None:
    found = []
    for again in (False, True):
        engine = PrivateEngine(adapted_of(family, again=again), family.losses)
        with engine.training():
            names, indices = active(engine.adapted, "*"), torch.arange(5)
            found.append(engine.gradients_by_record(family.records(5), indices, names))
    assert_bits(found[1], found[0])
    assert all(len(gradients) == 5 for gradients in found[1].values())


@pytest.mark.parametrize("family", [VIT, ROBERTA], ids=lambda family: family.name)
def test_in_bf16_steps_have_the_same_bits(family: Family) -> None:
    steps = []
    for again in (False, True):
        adapted = adapted_of(family, again=again, bf16=True)
        records = family.records(12)
        batch = records.batch(torch.arange(12))
        records = TensorRecords(
            {n: t.float() if t.is_floating_point() else t for n, t in batch.items()}
        )
        engine = PrivateEngine(adapted, family.losses)
        steps.append(update(engine, records, range(9), "*", NOISY))
    assert_bits(steps[1], steps[0])


@every_family
def test_blocks_run_again_and_keep_less(family: Family) -> None:
    kept = []
    for again in (False, True):
        adapted, batch = adapted_of(family, again=again), family.records(6).batch(torch.arange(6))
        engine = PrivateEngine(adapted, family.losses)
        engine._activate(active(adapted, "*"))
        with engine.training(), kept_bytes() as counted:
            engine._sampler.num_records = 6
            family.losses(adapted.model, batch)
        kept.append(counted[0])
    assert kept[1] < 0.5 * kept[0]


def test_frozen_first_layers_get_no_backward_pass() -> None:
    adapted = adapted_of(ROBERTA, again=True)
    seen: list[bool] = []
    embeddings = adapted.model.get_base_model().roberta.embeddings
    embeddings.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    PrivateEngine(adapted, ROBERTA.losses).verify(ROBERTA.records(6))
    assert seen
    assert not any(seen)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


def test_models_that_cannot_do_it_are_refused_by_name() -> None:
    adapted = attach(Plain(), LoRASpec(1, 1.0, 0.0, "fc", ("head",)), seed=1)
    with pytest.raises(InvalidValue, match=r"gradient-checkpointing = True .*no method for it"):
        checkpoint_gradients(adapted)
    still = AdaptedModel(ROBERTA.adapted().model, backbone_dropout=False)
    with pytest.raises(InvalidValue, match=r"false for a run with backbone-dropout = false"):
        checkpoint_gradients(still)
    base: Any = ROBERTA.adapted()
    type(base.model.get_base_model()).supports_gradient_checkpointing = False
    try:
        with pytest.raises(InvalidValue, match=r"false for this model \(.*not support"):
            checkpoint_gradients(base)
    finally:
        type(base.model.get_base_model()).supports_gradient_checkpointing = True


def test_the_cache_of_first_layers_is_off() -> None:
    """In the backward pass nothing would stand in for the modules that it left out."""
    for again in (False, True):
        config = RunConfig(gradient_checkpointing=again, prefix_cache=1.0)
        assert (PrefixCache.of(config, VIT.adapted()) is None) == again
