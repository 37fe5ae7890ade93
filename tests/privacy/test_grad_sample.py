from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.grad_sample import GradSampler
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.models import (
    FAMILIES,
    LLAMA,
    ROBERTA,
    SWIN,
    VIT,
    Family,
    active,
    engine_of,
    loop_gradients,
    plain_parameters,
    update,
)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 0
    for name, tensor in found.items():
        assert tensor.dtype == torch.float64
        assert tensor.shape == expected[name].shape, name
        assert float((tensor - expected[name]).abs().max()) <= 1e-12 * scale, name


@every_family
def test_gradients_equal_a_loop_over_records_in_phases_that_toggle(family: Family) -> None:
    records, engine = family.records(5), engine_of(family)
    indices = [3, 0, 4, 1]
    expected = loop_gradients(family, family.plain(), records, indices)
    assert set(expected) == set(engine.adapted.parameters)
    for name in expected:
        # A gradient that is zero would agree with anything.
        assert expected[name].flatten(1).norm(dim=1).min() > 0, name

    for mode in ("A", "B", "*", "A", "B"):
        names = active(engine.adapted, mode)
        found = engine.gradients_by_record(records, torch.tensor(indices), names)

        assert tuple(found) == names
        assert_equal(found, expected)


@every_family
def test_only_active_arrays_get_gradients_and_none_gets_an_ordinary_one(family: Family) -> None:
    records, engine = family.records(3), engine_of(family)
    parameters = engine.adapted.parameters

    for mode in ("*", "A", "B"):
        names = active(engine.adapted, mode)
        engine._activate(names)
        engine._fill_grad_samples(records, torch.arange(3), names)

        held = {n for n, p in parameters.items() if getattr(p, "grad_sample", None) is not None}
        assert held == set(names)
        assert all(p.grad is None for p in engine.adapted.model.parameters())


@every_family
@pytest.mark.parametrize("mode", ["A", "B", "*"])
def test_microbatches_change_nothing(family: Family, mode: str) -> None:
    records, mechanism = family.records(5), Mechanism(0.0, 0.05, 2, 5)
    whole = update(engine_of(family), records, range(5), mode, mechanism)

    parts = update(engine_of(family, microbatch=2), records, range(5), mode, mechanism)

    assert_equal(parts, whole)


def test_microbatches_get_noise_once() -> None:
    records = VIT.records(6)
    noisy, exact = Mechanism(2.0, 1.0, 3, 6), Mechanism(0.0, 1.0, 3, 6)

    def noise(microbatch: int | None) -> dict[str, Tensor]:
        engine = engine_of(VIT, microbatch=microbatch)
        with_noise = update(engine, records, range(6), "*", noisy)
        without = update(engine, records, range(6), "*", exact)
        return {name: with_noise[name] - without[name] for name in without}

    assert_equal(noise(1), noise(None))


@pytest.mark.parametrize("family", [VIT, SWIN, ROBERTA], ids=lambda family: family.name)
def test_gradient_checkpointing_changes_nothing(family: Family) -> None:
    records, engine = family.records(4), engine_of(family)
    expected = loop_gradients(family, family.plain(), records, range(4))
    base = engine.adapted.model.get_base_model()
    if family is ROBERTA:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        engine.adapted.model.train()  # transformers checkpoints in train mode only
    else:
        base.set_grad_checkpointing(True)

    for mode in ("B", "A", "*"):
        names = active(engine.adapted, mode)
        found = engine.gradients_by_record(records, torch.arange(4), names)
        assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_gradients_equal_those_of_opacus_hooks_where_these_work() -> None:
    records, engine, plain = VIT.records(4), engine_of(VIT), VIT.plain()
    hooked = GradSampleModule(plain.train(), loss_reduction="sum")
    VIT.losses(hooked, records.batch(torch.arange(4))).sum().backward()  # type: ignore[no-untyped-call]
    expected = {
        name: parameter.grad_sample  # type: ignore[attr-defined]
        for name, parameter in plain_parameters(plain).items()
    }

    found = engine.gradients_by_record(records, torch.arange(4), active(engine.adapted, "*"))

    assert set(found) == set(expected)
    assert_equal(found, expected)


@every_family
def test_the_gradient_of_a_is_zero_where_b_is_zero(family: Family) -> None:
    adapted = attach(family.model(), family.spec(), seed=1)
    engine = PrivateEngine(adapted, family.losses)
    found = engine.gradients_by_record(family.records(3), torch.arange(3), active(adapted, "*"))

    for name, gradient in found.items():
        assert bool((gradient == 0).all()) is (factor_of(name) == "A"), name


class Twice(nn.Module):
    """Uses one adapted layer twice, and a head on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
        return scores.sum(dim=1)


def test_a_layer_that_runs_twice_adds_both_uses_up() -> None:
    family = Family(
        "twice",
        Twice,
        lambda count: VIT.records(count),
        lambda model, batch: F.cross_entropy(
            model(batch["image"].flatten(1)[:, :60].reshape(-1, 10, 6)),
            batch["label"] % 3,
            reduction="none",
        ),
        "shared",
        ("head",),
    )
    records, engine = family.records(4), engine_of(family)
    expected = loop_gradients(family, family.plain(), records, range(4))

    found = engine.gradients_by_record(records, torch.arange(4), active(engine.adapted, "*"))

    assert set(found) == {"shared.lora_A.weight", "shared.lora_B.weight", "head.weight"}
    assert_equal(found, expected)


@every_family
def test_outputs_are_those_of_plain_peft(family: Family) -> None:
    records, adapted = family.records(3), family.adapted()
    GradSampler(adapted)
    batch = records.batch(torch.arange(3))

    with torch.no_grad():
        ours, theirs = family.losses(adapted.model, batch), family.losses(family.plain(), batch)
        with adapted.model.disable_adapter():
            without = family.losses(adapted.model, batch)
        bare = family.losses(family.model().eval(), batch)

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(without, bare, rtol=1e-12, atol=1e-12)
    assert (ours - bare).abs().max() > 1e-3


def test_inputs_get_their_gradient_through_frozen_and_active_factors_alike() -> None:
    config = LoraConfig(r=2, target_modules="0")
    layer = nn.Sequential(nn.Linear(4, 3))
    plain = get_peft_model(layer, config).double()
    adapted = attach(nn.Sequential(nn.Linear(4, 3)), LoRASpec(2, 8.0, 0.0, "0"), 0)
    adapted.model.double().load_state_dict(plain.state_dict())
    with torch.no_grad():
        for model in (plain, adapted.model):
            model.get_parameter("base_model.model.0.lora_B.default.weight").fill_(0.7)
    sampler = GradSampler(adapted)
    sampler.num_records = 2
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(model: nn.Module) -> Tensor:
        inputs = x.clone().requires_grad_()
        model(inputs).pow(2).sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    expected = gradient(plain)
    for trains_a, trains_b in ((True, True), (True, False), (False, True), (False, False)):
        adapted.layers[0].A.requires_grad_(trains_a)
        adapted.layers[0].B.requires_grad_(trains_b)
        torch.testing.assert_close(gradient(adapted.model), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [5, 1])
def test_rows_that_do_not_divide_among_the_records_are_refused_by_name(rows: int) -> None:
    sampler = GradSampler(LLAMA.adapted())
    sampler.num_records = 2

    with pytest.raises(PrivacyViolation, match=rf"'some\.layer' saw {rows} rows for 2 records"):
        sampler.rows(torch.zeros(rows, 3), "some.layer")


def test_the_tiny_swin_shifts_its_windows_and_has_several_an_image() -> None:
    block = SWIN.adapted().model.get_base_model().layers[0].blocks[1]

    assert (block.shift_size, block.window_size) == ((2, 2), (4, 4))
    assert tuple(block.input_resolution) == (8, 8)


def test_windows_of_a_record_are_folded_together() -> None:
    sampler = GradSampler(VIT.adapted())
    sampler.num_records = 2
    windows = torch.arange(2 * 4 * 3 * 5).view(8, 3, 5)  # four windows of three tokens a record

    folded = sampler.rows(windows, "qkv")

    assert torch.equal(folded, windows.view(2, 12, 5))


def test_a_hook_on_the_frozen_layer_is_called_and_changes_the_output() -> None:
    engine, records = PrivateEngine(VIT.adapted(), VIT.losses), VIT.records(3)
    batch = records.batch(torch.arange(3))
    engine._sampler.num_records = 3
    before = VIT.losses(engine.adapted.model, batch)
    base = engine.adapted.layers[0].base
    handle = base.register_forward_hook(lambda _module, _inputs, output: output + 1)
    hooked = VIT.losses(engine.adapted.model, batch)
    handle.remove()

    assert not torch.allclose(hooked, before, rtol=1e-3)
    assert torch.equal(VIT.losses(engine.adapted.model, batch), before)


class Doubled(nn.Linear):
    """A frozen layer that is no plain product."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def test_a_frozen_layer_of_its_own_kind_computes_what_it_computes() -> None:
    found = []
    for kind, factor in ((nn.Linear, 1.0), (Doubled, 0.5)):
        first = kind(4, 3)
        model = nn.Sequential(OrderedDict(first=first))
        with torch.no_grad():
            first.weight.copy_(factor * torch.arange(12.0).view(3, 4))
            first.bias.zero_()
        engine = PrivateEngine(
            attach(model, LoRASpec(2, 4.0, 0.0, "first"), seed=0),
            lambda net, batch: net(batch["x"]).square().sum(1),
        )
        with torch.no_grad():
            engine.adapted.layers[0].B.fill_(0.3)
        data = TensorRecords({"x": torch.eye(4)})
        names = list(engine.adapted.parameters)
        found.append(engine.gradients_by_record(data, torch.arange(4), names))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
