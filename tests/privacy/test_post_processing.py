"""Filters, preconditioning and AdamW read what was privatized, in that order."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora_flwr.config.state import state_folder
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.postprocessing.adam import NoiseAwareAdamW
from fedlora_flwr.privacy.postprocessing.filters import FILTERS, make_filter
from tests.clients.asking import Asker
from tests.conftest import MakeConfig
from tests.models import PLAIN_SGD, VIT, engine_of, values

MECHANISM = Mechanism(0.6, 0.5, 4, 8)
VARIANCE = (0.6 * 0.5 / 4) ** 2
BATCHES: tuple[list[int], ...] = ([0, 3, 5], [1, 2], [], [7, 4, 6, 0])
RATES = {"A": 0.3, "B": 0.2, None: 0.1}


class Recorded:
    """Noise that keeps what it was asked for, and what it gave."""

    def __init__(self, seed: int) -> None:
        self._noise = SeededNoise(seed)
        self.sums: list[Tensor] = []
        self.drawn: list[Tensor] = []

    def normal_like(self, reference: Tensor) -> Tensor:
        self.sums.append(reference.clone())
        self.drawn.append(self._noise.normal_like(reference))
        return self.drawn[-1].clone()


class Replayed:
    """The noise of one step once more."""

    def __init__(self, drawn: Sequence[Tensor]) -> None:
        self._drawn = iter(drawn)

    def normal_like(self, reference: Tensor) -> Tensor:
        drawn = next(self._drawn)
        assert drawn.shape == reference.shape
        return drawn


def settings(name: str = "sgd", **changes: Any) -> OptimizerSettings:
    usual: dict[str, Any] = {"lr_a": RATES["A"], "lr_b": RATES["B"], "lr_head": RATES[None]}
    return OptimizerSettings(name, **{**usual, **changes})


def set_values(engine: PrivateEngine, arrays: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in engine.adapted.parameters.items():
            parameter.copy_(arrays[name])


class Steps:
    """Private steps on a plan, each told apart: before, after, and the plain private gradient."""

    def __init__(
        self,
        plan: str,
        chosen: OptimizerSettings,
        filter_name: str = "none",
        watch: Callable[[PrivateEngine, Sequence[str]], None] | None = None,
    ) -> None:
        engine, twin, records = engine_of(VIT), engine_of(VIT), VIT.records(8)
        layout, parsed, noise = (
            Layout.of(engine.adapted.parameters),
            ComponentPlan.parse(plan),
            Recorded(1),
        )
        engine.start_round(MECHANISM, chosen, noise, make_filter(filter_name))
        self.noise, self.adapted = noise, engine.adapted
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        for step, batch in enumerate(BATCHES, 1):
            active, indices = layout.active(parsed, step), torch.tensor(batch, dtype=torch.int64)
            before, used = values(engine.adapted), len(noise.drawn)
            engine.step(records, indices, active)
            if watch is not None:
                watch(engine, active)
            self.before.append(before)
            self.after.append(values(engine.adapted))
            # The same step without any post-processing, at learning rate 1.
            set_values(twin, before)
            twin.start_round(MECHANISM, PLAIN_SGD, Replayed(noise.drawn[used:]))
            twin.step(records, indices, active)
            moved = values(twin.adapted)
            self.gradients.append({name: before[name] - moved[name] for name in active})


def preconditioned(grad: Tensor, name: str, state: dict[str, Tensor], scaling: float) -> Tensor:
    """Return ``s⁻² g (A·Aᵀ + ρ)⁻¹`` for B and its like for A, by an explicit inverse."""
    layer = name.rsplit(".lora_", 1)[0]
    if factor_of(name) == "B":
        other = state[f"{layer}.lora_A.weight"]
        gram = other @ other.T + 0.05 * torch.eye(len(other), dtype=other.dtype)
        return torch.matmul(grad, torch.linalg.inv(gram)) / scaling**2
    other = state[f"{layer}.lora_B.weight"]
    gram = other.T @ other + 0.05 * torch.eye(other.shape[1], dtype=other.dtype)
    return torch.matmul(torch.linalg.inv(gram), grad) / scaling**2


@pytest.mark.parametrize("plan", ["B/A", "*", "BA"])
@pytest.mark.parametrize("filter_name", FILTERS)
def test_the_filter_is_first_and_then_the_other_factor_as_it_is(
    plan: str, filter_name: str
) -> None:
    steps = Steps(plan, settings(precondition=True, ridge=0.05), filter_name)
    smooth, scaling = make_filter(filter_name), steps.adapted.layers[0].scaling
    assert scaling == 2.0
    for before, after, gradients in zip(steps.before, steps.after, steps.gradients, strict=True):
        for name, array in before.items():
            expected = array
            if name in gradients:
                step = smooth(name, gradients[name])
                if factor_of(name) is not None:
                    step = preconditioned(step, name, before, scaling)
                expected = array - RATES[factor_of(name)] * step
            torch.testing.assert_close(after[name], expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("plan", ["B/A", "*"])
@pytest.mark.parametrize("filter_name", FILTERS)
def test_adamw_is_told_the_noise_that_the_filter_leaves(plan: str, filter_name: str) -> None:
    gains, told = make_filter(filter_name), []

    def watch(engine: PrivateEngine, active: Sequence[str]) -> None:
        assert engine._optimizer is not None
        optimizer = engine._optimizer.original_optimizer
        assert isinstance(optimizer, NoiseAwareAdamW)
        for name in active:
            parameter = engine.adapted.parameters[name]
            gains(name, torch.zeros_like(parameter))
            expected = VARIANCE * gains.noise_gain(name)
            assert optimizer.noise_variance[parameter] == pytest.approx(expected, rel=1e-12)
            told.append(expected / VARIANCE)

    steps = Steps(plan, settings("adamw"), filter_name, watch=watch)
    assert len(told) == sum(map(len, steps.gradients))
    if filter_name != "none":
        assert min(told) < 0.7
    # And the step is that optimizer's, on the filtered gradients.
    smooth = make_filter(filter_name)
    alone = {n: torch.nn.Parameter(p.clone()) for n, p in steps.before[0].items()}
    optimizer = NoiseAwareAdamW(
        [{"params": [p], "lr": RATES[factor_of(n)]} for n, p in alone.items()]
    )
    for after, gradients in zip(steps.after, steps.gradients, strict=True):
        for name, parameter in alone.items():
            parameter.grad = None
            if name in gradients:
                parameter.grad = smooth(name, gradients[name])
                optimizer.noise_variance[parameter] = VARIANCE * smooth.noise_gain(name)
        optimizer.step()
        for name, parameter in alone.items():
            torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-7, atol=1e-10)


VARIANTS: list[dict[str, Any]] = [
    *[{"filter_name": name} for name in FILTERS],
    {"chosen": settings(lr_a=0.0, lr_b=0.0, lr_head=0.0, precondition=True, ridge=0.1)},
    {"chosen": settings("adamw", lr_a=0.0, lr_b=0.0, lr_head=0.0), "filter_name": "ema"},
]


@pytest.mark.parametrize("plan", ["B", "B/A", "*", "AB"])
def test_nothing_of_it_changes_what_is_clipped_or_noised(plan: str) -> None:
    still = settings(lr_a=0.0, lr_b=0.0, lr_head=0.0)
    plain = Steps(plan, still)
    for variant in VARIANTS:
        options: dict[str, Any] = {"chosen": still, **variant}
        steps = Steps(plan, **options)
        assert len(steps.noise.sums) == len(plain.noise.sums)
        for found, expected in zip(steps.noise.sums, plain.noise.sums, strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(steps.noise.drawn, plain.noise.drawn, strict=True):
            assert torch.equal(found, expected)
    assert any(bool(total.any()) for total in plain.noise.sums)


def test_all_of_it_costs_the_same(make_config: MakeConfig) -> None:
    found = set()
    variants: list[dict[str, Any]] = [
        {},
        {"filter": "binomial"},
        {"filter": "doppler", "precondition": True},
        {"optimizer": "adamw", "filter": "ema"},
    ]
    for number, changes in enumerate(variants):
        asker = Asker(make_config(**changes), run_id=number + 1)
        content = asker.train("B/A")
        epsilon = content.metric_records["metrics"]["epsilon"]
        with closing(sqlite3.connect(state_folder(asker.config) / "ledger.sqlite")) as db:
            row = db.execute(
                "SELECT noise_multiplier, sample_rate, steps, round FROM releases WHERE run = ?",
                [str(number + 1)],
            ).fetchall()
        found.add((epsilon, *row))
    assert len(found) == 1
