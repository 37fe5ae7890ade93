"""How far a joint step of A and B is from the sum of the two single steps, on the digits.

A library of `benchmarks.mechanisms`, without a command of its own. The loss is that of the public
records, F. A step along gradients g_A, g_B with noise changes F by D_AB if both factors move, and
by D_A or D_B if one does. The coupling is ``(D_AB - D_A - D_B) / |D_A + D_B|``. To second order its
numerator is ``η² g_Aᵀ H_AB g_B``, where H_AB is the mixed part of the Hessian. In the products of
the factors, the joint step also adds ``η² g_B g_A`` to the sum of the single ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config.recipes import load_recipe
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.trained.curvature import Surface

Row: TypeAlias = dict[str, Any]
Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Parameters
    ----------
    clients, steps : int
        Clients that train one after another, and their steps, before the later state.
    records : int
        Public records of the loss.
    draws : int
        Draws of the noise.
    rates : tuple[float, ...]
        Learning rates η of both factors.
    noises : tuple[float, ...]
        Norm of the noise over that of the gradient, factor by factor.
    """

    clients: int = 4
    steps: int = 40
    records: int = 180
    draws: int = 4
    rates: tuple[float, ...] = (0.02, 0.1, 0.2)
    noises: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0)


QUICK = Size(1, 4, 20, 1, (1e-2,), (0.0,))


def measure(size: Size) -> Iterator[Row]:
    """Yield a row for each state of the model, noise and rate."""
    for state, adapted, surface in _states(size):
        step = _Step(adapted, surface)
        for noise in size.noises:
            for rate in size.rates:
                count = size.draws if noise else 1
                found = [step.coupled(rate, noise, draw) for draw in range(count)]
                means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
                yield {"state": state, "noise": noise, "rate": rate, **means}


def _states(size: Size) -> Iterator[tuple[str, AdaptedModel, Surface]]:
    """Yield the model before training, and after steps on both factors that are clipped alone."""
    config = replace(load_recipe("digits"), local_steps=size.steps, device="cpu")
    trainer = LocalTrainer.build(config)
    # The trainer's own model computes gradients by record, which cannot be differentiated again.
    adapted = build_adapted(config, trainer.task)
    public = trainer.task.test_records()
    some = torch.linspace(0, len(public) - 1, size.records).long()
    batch = TensorRecords(public.batch(some)).batch(torch.arange(size.records))
    factors = [p for name, p in adapted.parameters.items() if factor_of(name)]
    loss = partial(_mean_loss, trainer, adapted.model, batch)
    surface = Surface(factors, [loss])
    yield "start", adapted, surface
    arrays = dict(trainer.start)
    for client in range(size.clients):
        records = trainer.task.client_records(client, 10)
        mechanism = Mechanism(0.0, config.clip_norm, config.batch_size, len(records))
        plan = ComponentPlan.parse("*")
        arrays |= trainer.train(arrays, plan, records, mechanism, ("coupling", client)).arrays
    adapted.write(arrays)
    yield "later", adapted, surface


def _mean_loss(
    trainer: LocalTrainer, model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    return trainer.task.losses(model, batch).mean()


class _Step:
    """Steps from where a model is."""

    def __init__(self, adapted: AdaptedModel, surface: Surface) -> None:
        self._surface, self._start = surface, surface.value()
        self._named = {n: p for n, p in adapted.parameters.items() if factor_of(n)}
        self._gradient = surface.gradient()
        marks = [np.full(p.numel(), factor_of(n) == "A") for n, p in self._named.items()]
        self._is_a = np.concatenate(marks)

    def coupled(self, rate: float, noise: float, seed: int) -> Row:
        """Return the coupling of one step, and what the second-order term predicts."""
        direction = self._gradient.copy()
        rng = np.random.default_rng(seed)
        for own in (self._is_a, ~self._is_a):
            drawn = rng.standard_normal(own.sum())
            scale = float(np.linalg.norm(self._gradient[~self._is_a]))
            direction[own] += noise * scale * drawn / np.linalg.norm(drawn)
        a, b = direction * self._is_a, direction * ~self._is_a
        both, first, second = (self._change(-rate * step) for step in (direction, a, b))
        predicted = rate**2 * float(a @ self._surface.product(b))
        whole = abs(first + second)
        return {
            "single": first + second,
            "joint": both,
            "coupling": (both - first - second) / whole,
            "second_order": predicted / whole,
            "product": self._cross(rate, direction),
        }

    def _change(self, step: Array) -> float:
        with self._surface.moved(step):
            return self._surface.value() - self._start

    def _cross(self, rate: float, direction: Array) -> float:
        """Return ``‖η² g_B g_A‖`` over ``‖η (g_B A + B g_A)‖``, over all layers."""
        steps: dict[str, Array] = {}
        position = 0
        for name, parameter in self._named.items():
            count = parameter.numel()
            part = direction[position : position + count].reshape(tuple(parameter.shape))
            steps[name], position = part, position + count
        cross = single = 0.0
        for name, parameter in self._named.items():
            if factor_of(name) == "A":
                other = name.replace("lora_A", "lora_B")
                low = parameter.detach().double().numpy()
                high = self._named[other].detach().double().numpy()
                cross += float(np.square(rate * steps[other] @ steps[name]).sum())
                single += float(np.square(steps[other] @ low + high @ steps[name]).sum())
        return float(np.sqrt(cross / single))
