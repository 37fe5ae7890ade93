from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.figures import operators
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy import engine as engine_module
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import (
    FAMILIES,
    PLAIN_SGD,
    ROBERTA,
    SWIN,
    VIT,
    Family,
    active,
    engine_of,
    joint_norm,
    loop_gradients,
    plain_parameters,
    update,
    values,
)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_mode = pytest.mark.parametrize("mode", ["A", "B", "*"])


def largest_influence(family: Family, mode: str, clip: float) -> float:
    """Return how far one record moves the clipped sum, over all trained tensors together."""
    records, engine = family.records(6), engine_of(family)
    mechanism = Mechanism(0.0, clip, 2, 6)
    batches = [([0, 1, 2, 3], position) for position in range(4)] + [([5], 0), ([4, 2], 1)]
    found = []
    for batch, position in batches:
        without = [index for place, index in enumerate(batch) if place != position]
        with_record = update(engine, records, batch, mode, mechanism)
        base = update(engine, records, without, mode, mechanism)
        found.append(joint_norm(with_record[name] - base[name] for name in base))
    return max(found)


def assert_bounded(influence: float, clip: float) -> None:
    assert influence <= clip * (1 + 1e-6)


@every_family
@every_mode
def test_one_record_moves_the_sum_by_at_most_c_over_all_tensors_together(
    family: Family, mode: str
) -> None:
    small, large = 1e-2, 1e3
    influence = largest_influence(family, mode, small)

    assert_bounded(influence, small)
    # Attained, so that the bound says something; and out of reach where nothing is clipped.
    assert influence == pytest.approx(small, rel=1e-3)
    assert largest_influence(family, mode, large) < 0.5 * large


class _PerTensorClipping(NoisyOptimizer):
    def clip_and_accumulate(self) -> None:
        sums = []
        for rows in torch.split(self.rows(), [p.numel() for p in self.params], dim=1):
            factors = (1 / (rows.norm(dim=1) + 1e-6)).clamp(max=1 / self.max_grad_norm)
            sums.append(factors @ rows)
        self.summed = torch.cat(sums)


class _BatchMeanClipping(NoisyOptimizer):
    def clip_and_accumulate(self) -> None:
        mean = self.rows().sum(0) / self.expected_batch_size
        factor = min(1.0, self.max_grad_norm / (joint_norm([mean]) + 1e-12))
        self.summed = mean * factor * self.expected_batch_size / self.max_grad_norm


@pytest.mark.parametrize("broken", [_PerTensorClipping, _BatchMeanClipping])
@every_mode
def test_the_bound_catches_broken_clipping(
    monkeypatch: pytest.MonkeyPatch, broken: type, mode: str
) -> None:
    monkeypatch.setattr(engine_module, "NoisyOptimizer", broken)

    with pytest.raises(AssertionError):
        assert_bounded(largest_influence(VIT, mode, 1e-2), 1e-2)


def test_clipping_and_noise_take_no_operator_for_each_tensor() -> None:
    counts = {}
    for mode in ("A", "*"):
        engine = engine_of(VIT)
        names = active(engine.adapted, mode)
        engine.start_round(Mechanism(1.0, 1.0, 4, 8), PLAIN_SGD, SeededNoise(0))
        engine.verify(VIT.records(4))
        engine._activate(names)
        engine._fill_grad_samples(VIT.records(4), torch.arange(4), names)
        optimizer = engine._optimizer
        assert optimizer is not None
        counts[len(names)] = operators(optimizer.pre_step)
    assert len(counts) == 2
    assert len(set(counts.values())) == 1


@every_mode
def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch_size(mode: str) -> None:
    records, engine, indices = VIT.records(8), engine_of(VIT), [6, 2, 5]
    names = active(engine.adapted, mode)
    gradients = loop_gradients(VIT, VIT.plain(), records, indices)
    norms = [joint_norm(gradients[name][i] for name in names) for i in range(3)]
    clip = sorted(norms)[1]  # One record below, one above.
    factors = torch.tensor([min(1.0, clip / norm) for norm in norms], dtype=torch.float64)
    before = values(engine.adapted)

    engine.start_round(
        Mechanism(0.0, clip, 7, 8),
        OptimizerSettings("sgd", lr_a=0.2, lr_b=0.3, lr_head=0.5),
        SeededNoise(0),
    )
    engine.step(records, torch.tensor(indices), names)

    rates = {"A": 0.2, "B": 0.3, None: 0.5}
    for name, start in before.items():
        mean = torch.einsum("i,i...", factors, gradients[name]) / 7
        expected = start - rates[factor_of(name)] * mean if name in names else start
        torch.testing.assert_close(
            engine.adapted.parameters[name].data, expected, rtol=1e-5, atol=0
        )


def test_what_a_failed_step_has_summed_goes_nowhere() -> None:
    engine, records = engine_of(VIT, microbatch=2), VIT.records(4)
    engine.verify(records)
    engine.start_round(Mechanism(0.0, 1.0, 4, 8), PLAIN_SGD, SeededNoise(0))
    before, names = values(engine.adapted), active(engine.adapted, "*")
    calls = []

    def fails_at_the_second(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return VIT.losses(model, batch)

    engine._losses = fails_at_the_second
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step(records, torch.arange(4), names)
    assert not any(module.training for module in engine.adapted.model.modules())
    engine.step(records, torch.arange(0), names)
    for name, start in before.items():
        assert torch.equal(engine.adapted.parameters[name].data, start), name


def frozen_state(engine: PrivateEngine, trained: Sequence[str]) -> dict[str, Tensor]:
    """Return a copy of every tensor of the model but the trained ones."""
    moving = {id(engine.adapted.parameters[name]) for name in trained}
    model = engine.adapted.model
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in tensors if id(t) not in moving}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@every_mode
@pytest.mark.parametrize("batch", [[], [0, 3, 4]], ids=["empty", "three"])
def test_noise_has_the_stated_deviation_on_trained_coordinates_and_is_nowhere_else(
    mode: str, batch: list[int]
) -> None:
    sigma, clip, size = 1.7, 0.4, 3
    records, engine = VIT.records(6), engine_of(VIT)
    names = active(engine.adapted, mode)
    frozen = frozen_state(engine, names)
    noisy, exact = Mechanism(sigma, clip, size, 6), Mechanism(0.0, clip, size, 6)
    signal = update(engine, records, batch, mode, exact)

    drawn = [update(engine, records, batch, mode, noisy, seed) for seed in range(25)]

    for name in signal:
        # What `update` returns is b times the released gradient.
        noise = torch.stack([each[name] - signal[name] for each in drawn]) / size
        if name not in names:
            assert bool((noise == 0).all()), name
            continue
        count = noise.numel()
        std = sigma * clip / size
        assert noise.std().item() == pytest.approx(std, rel=4 / (2 * count) ** 0.5), name
        assert abs(noise.mean().item()) < 4 * std / count**0.5, name
    assert_same(frozen_state(engine, names), frozen)


def test_noise_of_different_tensors_and_steps_is_independent() -> None:
    engine, records = engine_of(VIT), VIT.records(4)
    names = active(engine.adapted, "*")
    engine.start_round(Mechanism(1.0, 1.0, 1, 4), PLAIN_SGD, SeededNoise(5))
    steps = []
    for _ in range(2):
        before = values(engine.adapted)
        engine.step(records, torch.tensor([], dtype=torch.int64), names)
        steps.append({n: p.detach() - before[n] for n, p in engine.adapted.parameters.items()})

    rows = [step[name].flatten()[:24] for step in steps for name in names if "lora" in name]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.85
    assert len({float(row[0]) for row in rows}) == len(rows)


@every_family
@every_mode
def test_an_empty_batch_is_a_step_of_pure_noise(family: Family, mode: str) -> None:
    engine, records = engine_of(family, microbatch=2), family.records(4)
    names = active(engine.adapted, mode)
    engine.start_round(
        Mechanism(1.0, 1.0, 2, 4), OptimizerSettings("adamw", 0.1, 0.1, 0.1), SeededNoise(0)
    )
    before = values(engine.adapted)

    engine.step(records, torch.tensor([], dtype=torch.int64), names)

    for name, parameter in engine.adapted.parameters.items():
        moved = parameter.detach() != before[name]
        assert bool(moved.all()) if name in names else not bool(moved.any())
        if name in names:
            assert adam_state(engine, name)["step"] == 1


def adam_state(engine: PrivateEngine, name: str) -> Mapping[str, Tensor]:
    assert engine._optimizer is not None
    state: Mapping[str, Tensor] = engine._optimizer.state[engine.adapted.parameters[name]]
    return state


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings("sgd", 0.1, 0.2, 0.05, momentum=0.9, weight_decay=0.1),
        OptimizerSettings("adamw", 0.01, 0.02, 0.005, weight_decay=0.1),
        OptimizerSettings("adamw-plain", 0.01, 0.02, 0.005, weight_decay=0.1),
    ],
    ids=lambda settings: settings.name,
)
def test_each_factor_is_optimised_as_if_it_were_alone(settings: OptimizerSettings) -> None:
    engine, records, plain = engine_of(VIT), VIT.records(8), VIT.plain()
    parameters, rates = plain_parameters(plain), dict(_rates(settings))
    alone = {
        factor: settings.build(
            [{"params": [p for n, p in parameters.items() if factor_of(n) == factor], "lr": lr}]
        )
        for factor, lr in rates.items()
    }
    engine.start_round(Mechanism(0.0, float("inf"), 4, 8), settings, SeededNoise(0))
    generator = torch.Generator().manual_seed(0)

    for mode in ("B", "A", "B", "B", "A", "*"):
        names = active(engine.adapted, mode)
        indices = torch.randperm(8, generator=generator)[:3]
        frozen = frozen_state(engine, names)
        engine.step(records, indices, names)
        assert_same(frozen_state(engine, names), frozen)

        plain.zero_grad()
        (VIT.losses(plain, records.batch(indices)).sum() / 4).backward()  # type: ignore[no-untyped-call]
        for factor in {factor_of(name) for name in names}:
            alone[factor].step()

    for name, parameter in engine.adapted.parameters.items():
        torch.testing.assert_close(parameter.data, parameters[name].data, rtol=1e-9, atol=1e-11)
    if settings.name == "adamw":
        steps = {factor_of(n): int(adam_state(engine, n)["step"]) for n in parameters}
        assert steps == {"A": 3, "B": 4, None: 6}


def test_plain_adamw_is_torchs_on_the_noisy_gradient() -> None:
    mechanism, indices = Mechanism(2.0, 0.5, 4, 8), torch.arange(4)
    moved = {}
    for name in ("sgd", "adamw-plain", "adamw"):
        engine, records = engine_of(VIT), VIT.records(8)
        before = values(engine.adapted)
        rates = (0.01,) * 3
        engine.start_round(mechanism, OptimizerSettings(name, *rates), SeededNoise(5))
        engine.step(records, indices, list(before))
        after = values(engine.adapted)
        moved[name] = {n: (before[n] - after[n]) / 0.01 for n in before}

    for name, gradient in moved["sgd"].items():
        # The first step of Adam is g / (|g| + eps).
        expected = gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(moved["adamw-plain"][name], expected, rtol=1e-6, atol=1e-6)
        assert (moved["adamw"][name] - expected).abs().max() > 0.1


def _rates(settings: OptimizerSettings) -> list[tuple[str | None, float]]:
    return [("A", settings.lr_a), ("B", settings.lr_b), (None, settings.lr_head)]


def test_the_optimiser_holds_exactly_what_trains() -> None:
    engine, records = engine_of(VIT), VIT.records(4)
    engine.start_round(Mechanism(1.0, 1.0, 2, 4), PLAIN_SGD, SeededNoise(0))
    assert engine._optimizer is not None

    for mode in ("B", "A", "*", "B"):
        names = active(engine.adapted, mode)
        engine.step(records, torch.arange(2), names)

        held = [id(p) for group in engine._optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(engine.adapted.parameters[name]) for name in names)


def test_a_round_starts_with_a_fresh_optimiser_state() -> None:
    engine, records = engine_of(VIT), VIT.records(8)
    start, results = values(engine.adapted), []
    settings = OptimizerSettings("sgd", 0.1, 0.1, 0.1, momentum=0.9)
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in engine.adapted.parameters.items():
                parameter.copy_(start[name])
        engine.start_round(Mechanism(1.0, 1.0, 4, 8), settings, SeededNoise(3))
        for mode in ("B", "A", "B"):
            engine.step(records, torch.arange(4), active(engine.adapted, mode))
        results.append(values(engine.adapted))

    assert_same(*results)


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
def test_dropout_drops_the_inputs_of_the_adapters_as_in_plain_peft(family: Family) -> None:
    records, engine, plain = family.records(4), engine_of(family, 0.5), family.plain(0.5)
    names = active(engine.adapted, "*")
    engine.verify(records)
    before = values(engine.adapted)
    engine.start_round(Mechanism(0.0, float("inf"), 1, 4), PLAIN_SGD, SeededNoise(0))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        engine.step(records, torch.arange(4), names)
        torch.manual_seed(9)
        loss = family.losses(plain.train(), records.batch(torch.arange(4))).sum()

    parameters = plain_parameters(plain)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = dict(zip(parameters, gradients, strict=True))
    for name in names:
        moved = before[name] - engine.adapted.parameters[name].detach()
        torch.testing.assert_close(moved, expected[name], rtol=1e-8, atol=1e-11)
    without = loop_gradients(family, plain.eval(), records, range(4))
    assert any(not torch.allclose(without[n].sum(0), expected[n], rtol=0.05) for n in names)


def test_evaluation_between_steps_is_without_dropout() -> None:
    engine, records = engine_of(VIT, 0.5), VIT.records(4)
    engine.start_round(Mechanism(1.0, 1.0, 2, 4), PLAIN_SGD, SeededNoise(0))
    engine.step(records, torch.arange(4), active(engine.adapted, "*"))
    batch = records.batch(torch.arange(4))

    first, second = (VIT.losses(engine.adapted.model, batch) for _ in range(2))

    assert torch.equal(first, second)


def test_a_loop_of_steps_drops_in_each_of_them_and_not_after() -> None:
    moved = []
    for looped in (True, False):
        engine, records = engine_of(VIT, 0.5), VIT.records(4)
        engine.start_round(Mechanism(0.0, 1.0, 2, 4), PLAIN_SGD, SeededNoise(0))
        torch.manual_seed(0)
        with engine.training() if looped else nullcontext():
            for _ in range(2):
                engine.step(records, torch.arange(4), active(engine.adapted, "*"))
                assert engine.adapted.layers[0].dropout.training is looped
        assert not any(module.training for module in engine.adapted.model.modules())
        moved.append(engine.adapted.read())

    for name, array in moved[0].items():
        assert np.array_equal(array, moved[1][name])


def test_poisson_batches_are_independent_draws_of_every_record() -> None:
    mechanism, steps = Mechanism(1.0, 1.0, 2, 20), 4000
    batches = list(poisson_batches(mechanism, steps, seed=1))
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    counts = torch.cat(batches).bincount(minlength=20) / steps

    assert len(batches) == steps
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert sizes.mean().item() == pytest.approx(2, abs=0.09)  # four standard errors
    assert sizes.var().item() == pytest.approx(20 * 0.1 * 0.9, rel=0.1)
    assert (counts - 0.1).abs().max() < 4.5 * (0.1 * 0.9 / steps) ** 0.5
    assert (sizes == 0).double().mean().item() == pytest.approx(0.9**20, abs=0.025)


@pytest.mark.parametrize("other", [2, 1 + 2**32])
def test_poisson_batches_follow_all_bits_of_their_seed(other: int) -> None:
    mechanism = Mechanism(1.0, 1.0, 16, 64)
    drawn = {
        seed: [batch.tolist() for batch in poisson_batches(mechanism, 5, seed)]
        for seed in (1, other)
    }

    assert drawn[1] == [batch.tolist() for batch in poisson_batches(mechanism, 5, 1)]
    assert drawn[1] != drawn[other]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("noise multiplier", {"noise_multiplier": -1.0}),
        ("noise multiplier", {"noise_multiplier": float("nan")}),
        ("clip-norm", {"clip_norm": 0.0}),
        ("clip-norm", {"clip_norm": float("nan")}),
        ("clip-norm", {"clip_norm": float("inf")}),
        ("batch-size", {"batch_size": 0}),
        ("batch-size", {"batch_size": 9}),
    ],
)
def test_a_mechanism_that_means_nothing_is_refused_by_name(
    key: str, changes: dict[str, float]
) -> None:
    usual = {"noise_multiplier": 1.0, "clip_norm": 1.0, "batch_size": 4, "num_records": 8}

    with pytest.raises(InvalidValue) as caught:
        Mechanism(**{**usual, **changes})  # type: ignore[arg-type]

    assert caught.value.key == key


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    engine = engine_of(VIT)

    with pytest.raises(InvalidValue, match="optimizer = 'lion'"):
        engine.start_round(
            Mechanism(1.0, 1.0, 2, 4), OptimizerSettings("lion", 1, 1, 1), SeededNoise(0)
        )


def test_a_step_needs_a_round() -> None:
    engine = engine_of(ROBERTA)

    with pytest.raises(RuntimeError, match="start_round"):
        engine.step(ROBERTA.records(2), torch.arange(2), active(engine.adapted, "B"))
