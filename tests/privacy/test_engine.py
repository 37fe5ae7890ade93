from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from benchmarks.figures import operators
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy import engine as engine_module
from fedlora_flwr.privacy.clipping import NoisyOptimizer
from fedlora_flwr.privacy.engine import OptimizerSettings
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import (
    FAMILIES,
    PLAIN_SGD,
    VIT,
    Family,
    active,
    engine_of,
    joint_norm,
    loop_gradients,
    update,
    values,
)
from tests.privacy.support import adam_state, assert_same, frozen_state

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
