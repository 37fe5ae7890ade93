"""A round of private steps: its optimizer, its modes, its dropout."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.privacy.engine import OptimizerSettings
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from tests.models import (
    PLAIN_SGD,
    ROBERTA,
    SWIN,
    VIT,
    Family,
    active,
    engine_of,
    loop_gradients,
    plain_parameters,
    values,
)
from tests.privacy.support import adam_state, assert_same, frozen_state


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings("sgd", 0.1, 0.2, 0.05, momentum=0.9, weight_decay=0.1),
        OptimizerSettings("adamw", 0.01, 0.02, 0.005, weight_decay=0.1),
        OptimizerSettings("adamw-plain", 0.01, 0.02, 0.005, weight_decay=0.1),
    ],
    ids=lambda settings: settings.name,
)
def test_each_factor_is_optimized_as_if_it_were_alone(settings: OptimizerSettings) -> None:
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


def test_a_proximal_term_is_added_after_clipping_and_noise() -> None:
    engine, records, plain = engine_of(VIT), VIT.records(8), VIT.plain()
    parameters, mu, rate = plain_parameters(plain), 0.7, 0.3
    start = {name: p.detach().clone() for name, p in parameters.items()}
    settings = OptimizerSettings("sgd", rate, rate, rate, proximal_mu=mu)
    names, clip = list(parameters), 0.05
    engine.start_round(Mechanism(0.0, clip, 4, 8), settings, SeededNoise(0))

    for step in range(3):
        indices = [step, step + 1, step + 4]
        engine.step(records, torch.tensor(indices), names)
        rows = loop_gradients(VIT, plain, records, indices)
        flat = torch.cat([rows[name].flatten(1) for name in names], dim=1)
        factors = (clip / flat.norm(dim=1)).clamp(max=1.0)
        with torch.no_grad():
            for name, parameter in parameters.items():
                clipped = torch.tensordot(factors, rows[name], dims=1) / 4
                pull = mu * (parameter.data - start[name])
                parameter.sub_(rate * (clipped + pull))

    for name, parameter in engine.adapted.parameters.items():
        torch.testing.assert_close(parameter.data, parameters[name].data, rtol=1e-9, atol=1e-11)
    engine.start_round(Mechanism(0.0, clip, 4, 8), PLAIN_SGD, SeededNoise(0))
    before = values(engine.adapted)
    engine.step(records, torch.tensor([], dtype=torch.int64), names)
    assert all((values(engine.adapted)[n] == before[n]).all() for n in names)  # The term is gone.


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


def test_the_optimizer_holds_exactly_what_trains() -> None:
    engine, records = engine_of(VIT), VIT.records(4)
    engine.start_round(Mechanism(1.0, 1.0, 2, 4), PLAIN_SGD, SeededNoise(0))
    assert engine._optimizer is not None

    for mode in ("B", "A", "*", "B"):
        names = active(engine.adapted, mode)
        engine.step(records, torch.arange(2), names)

        held = [id(p) for group in engine._optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(engine.adapted.parameters[name]) for name in names)


def test_a_round_starts_with_a_fresh_optimizer_state() -> None:
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
