"""What the private step refuses, and what it survives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import FAMILIES, PLAIN_SGD, VIT, Family, active, engine_of, update, values

PRIVATE = Mechanism(1.0, 1.0, 2, 4)


class Tokens(nn.Module):
    """Classifies 6 tokens of 4 features; ``mix`` sees all hidden rows of the batch at once."""

    def __init__(self, mix: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.adapted = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self._mix = mix

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self._mix(x, self.adapted)).mean(dim=1))
        return scores


def batch_first(x: Tensor, layer: nn.Module) -> Tensor:
    hidden: Tensor = layer(x)
    return hidden


def time_first(x: Tensor, layer: nn.Module) -> Tensor:
    hidden: Tensor = layer(x.transpose(0, 1))
    return hidden.transpose(0, 1)


def normalized(x: Tensor, layer: nn.Module) -> Tensor:
    hidden: Tensor = layer(x)
    return hidden - 0.5 * hidden.mean(dim=0)


def scaled_by_the_batch(x: Tensor, layer: nn.Module) -> Tensor:
    hidden: Tensor = layer(x)
    scaled: Tensor = hidden / hidden.detach().norm(dim=0)
    return scaled


def slightly_mixed(x: Tensor, layer: nn.Module) -> Tensor:
    hidden: Tensor = layer(x)
    return hidden + 1e-4 * hidden.roll(1, dims=0)


def tokens_engine(mix: Callable[[Tensor, nn.Module], Tensor]) -> PrivateEngine:
    torch.manual_seed(0)
    adapted = attach(Tokens(mix), LoRASpec(2, 4.0, 0.0, "adapted", ("head",)), seed=0)
    return PrivateEngine(adapted, token_losses)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")


def token_records(same: bool = False) -> TensorRecords:
    x = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0))
    return TensorRecords(
        {
            "x": x[:1].expand(4, 6, 4) if same else x,
            "label": torch.zeros(4, dtype=torch.int64) if same else torch.arange(4) % 3,
        }
    )


def one_step(engine: PrivateEngine, records: TensorRecords, mode: str = "*") -> None:
    engine.start_round(PRIVATE, PLAIN_SGD, SeededNoise(0))
    engine.step(records, torch.arange(2), active(engine.adapted, mode))


@pytest.mark.parametrize("mix", [time_first, normalized, scaled_by_the_batch, slightly_mixed])
def test_a_model_that_mixes_records_is_refused_with_the_layers_name(
    mix: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    engine = tokens_engine(mix)
    before = values(engine.adapted)

    with pytest.raises(PrivacyViolation, match=r"'adapted\.lora_[AB]\.weight' .*other records"):
        one_step(engine, token_records())

    assert all(torch.equal(p, before[n]) for n, p in engine.adapted.parameters.items())


@pytest.mark.parametrize("mix", [time_first, normalized])
def test_records_that_are_alike_do_not_hide_the_mixing(
    mix: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    with pytest.raises(PrivacyViolation, match="other records"):
        one_step(tokens_engine(mix), token_records(same=True))


@pytest.mark.parametrize("mix", [time_first, normalized, slightly_mixed])
def test_records_without_an_answer_do_not_hide_the_mixing(
    mix: Callable[[Tensor, nn.Module], Tensor],
) -> None:
    x = torch.randn(9, 6, 4, generator=torch.Generator().manual_seed(0))
    label = torch.full((9,), -100)
    label[[4, 7]] = torch.tensor([1, 2])

    with pytest.raises(PrivacyViolation, match="other records"):
        one_step(tokens_engine(mix), TensorRecords({"x": x, "label": label}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sound_models_are_let_through_unchanged(family: Family) -> None:
    engine, records = engine_of(family), family.records(3)
    before = values(engine.adapted)
    torch.manual_seed(0)
    state = torch.get_rng_state()

    engine.verify(records)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in engine.adapted.parameters.items())
    one_step(tokens_engine(batch_first), token_records())


def test_an_array_whose_gradient_is_zero_is_no_sign_of_mixing() -> None:
    def most_likely_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = model.get_submodule("adapted")(batch["x"])
        scores = model.get_submodule("head")(torch.tanh(hidden))[..., 0]
        # What is added to all tokens alike, the head's bias, changes nothing but by rounding.
        return F.cross_entropy(scores, batch["label"], reduction="none")

    engine = PrivateEngine(tokens_engine(batch_first).adapted, most_likely_token)
    records = token_records()
    engine.verify(records)

    found = engine.gradients_by_record(records, torch.arange(2), ["head.bias", "head.weight"])
    assert found["head.bias"].abs().max() < 1e-6 < 1e-3 < found["head.weight"].abs().max()


def test_a_model_in_train_mode_with_dropout_is_checked_without_it() -> None:
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules="adapted")
    model = get_peft_model(Tokens(batch_first), config).train()

    one_step(PrivateEngine(AdaptedModel(model), token_losses), token_records())


def test_batch_norm_runs_on_its_stored_statistics_and_keeps_them() -> None:
    class Normed(Tokens):
        def __init__(self) -> None:
            super().__init__(lambda x, layer: self.norm(layer(x).mT).mT)
            self.norm = nn.BatchNorm1d(4)

    adapted = attach(Normed(), LoRASpec(2, 4.0, 0.0, "adapted"), seed=0)
    before = {name: b.clone() for name, b in adapted.model.named_buffers()}

    one_step(PrivateEngine(adapted, token_losses), token_records())

    assert before
    assert all(torch.equal(b, before[name]) for name, b in adapted.model.named_buffers())


def test_a_layer_that_keeps_statistics_of_records_is_refused_by_name() -> None:
    class Normed(Tokens):
        def __init__(self) -> None:
            super().__init__(lambda x, layer: self.norm(layer(x).mT).mT)
            self.norm = nn.InstanceNorm1d(4, track_running_stats=True)

    adapted = attach(Normed(), LoRASpec(2, 4.0, 0.0, "adapted"), seed=0)

    with pytest.raises(PrivacyViolation, match=r"norm' keeps statistics"):
        one_step(PrivateEngine(adapted, token_losses), token_records())


def test_a_mean_loss_is_refused() -> None:
    engine = PrivateEngine(VIT.adapted(), lambda model, batch: VIT.losses(model, batch).mean())

    with pytest.raises(PrivacyViolation, match="one loss per record"):
        one_step(engine, VIT.records(4))


def test_a_layer_that_does_not_run_is_named() -> None:
    engine = tokens_engine(lambda x, layer: x)

    with pytest.raises(PrivacyViolation, match=r"'adapted\.lora_A\.weight'.*did not run"):
        one_step(engine, token_records())


class _Careless(torch.optim.SGD):
    """Also moves a tensor that nobody asked it to."""

    victim: Tensor

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            self.victim.mul_(0.999)


@pytest.mark.parametrize("victim", ["blocks.0.norm1.weight", "blocks.1.attn.qkv.lora_A.weight"])
def test_a_step_that_moves_a_frozen_tensor_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    engine, records = engine_of(VIT), VIT.records(4)
    exchanged = engine.adapted.parameters
    tensor = exchanged.get(victim)
    _Careless.victim = (
        engine.adapted.model.get_base_model().get_parameter(victim) if tensor is None else tensor
    )
    monkeypatch.setattr(OptimizerSettings, "build", lambda _, groups: _Careless(groups, lr=0.0))

    stem = victim.removesuffix(".weight").replace(".", r"\.")
    with pytest.raises(PrivacyViolation, match=rf"{stem}.*moved although it is frozen"):
        one_step(engine, records, "B")


def test_a_step_that_leaves_an_active_tensor_where_it_was_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)

    with pytest.raises(PrivacyViolation, match="is active but did not move"):
        one_step(engine_of(VIT), VIT.records(4), "B")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_record_changes_nothing_but_its_own_share(value: float) -> None:
    batch = VIT.records(6).batch(torch.arange(6))
    images = batch["image"].clone()
    images[2, 0, 0, 0] = value
    broken = TensorRecords({**batch, "image": images})
    engine, mechanism = engine_of(VIT), Mechanism(0.0, 0.1, 2, 6)
    expected = update(engine, VIT.records(6), [0, 5], "*", mechanism)

    found = update(engine, broken, [0, 2, 5], "*", mechanism)

    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


def test_without_privacy_a_broken_record_stays_visible() -> None:
    batch = VIT.records(6).batch(torch.arange(6))
    broken = TensorRecords({**batch, "image": batch["image"] * float("nan")})
    mechanism = replace(PRIVATE, noise_multiplier=0.0, clip_norm=float("inf"))

    found = update(engine_of(VIT), broken, [0, 1], "*", mechanism)

    assert all(bool(tensor.isnan().any()) for tensor in found.values())


def test_a_parameter_that_became_trainable_is_refused_at_the_next_round() -> None:
    engine = engine_of(VIT)
    one_step(engine, VIT.records(4))
    engine.adapted.model.get_base_model().norm.weight.requires_grad_(True)

    with pytest.raises(PrivacyViolation, match=r"'norm\.weight' is trainable"):
        one_step(engine, VIT.records(4))
