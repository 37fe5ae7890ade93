"""The attacker: the server, who sees each upload, and guesses which canaries were there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.audit.bounds import Scores
from fedlora_flwr.audit.canaries import AuditRecords
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings

Arrays = Mapping[str, NDArray[np.floating[Any]]]
Gradients = NDArray[np.float64]
_PRIOR = 0.25
"""Variance of a fair coin."""


@dataclass(frozen=True)
class View:
    """One round of one mechanism, as the server sees it.

    Parameters
    ----------
    start : Mapping[str, ndarray]
        The arrays that the server sent.
    seen : Mapping[str, ndarray]
        For each array that came back: the sum of clipped gradients and noise, over the clip norm,
        as it was before the weights were divided out.
    steps : Mapping[tuple of str, int]
        How often each set of arrays trained.
    """

    start: Arrays
    seen: Arrays
    steps: Mapping[tuple[str, ...], int]


@dataclass(frozen=True)
class Evidence:
    """What views say of canaries: the sums of a Gaussian likelihood, which add up over rounds.

    Parameters
    ----------
    towards : ndarray
        Products of what was seen and each canary's gradient, over the noise's variance, shape (k,).
    overlap : ndarray
        Products of the canaries' gradients, over the noise's variance, shape (k, k).
    """

    towards: NDArray[np.float64]
    overlap: NDArray[np.float64]

    def __add__(self, other: Evidence) -> Evidence:
        """Return the evidence of two independent views."""
        return Evidence(self.towards + other.towards, self.overlap + other.overlap)

    @property
    def scores(self) -> Scores:
        """How much speaks for each canary, shape (k,).

        For one canary it is the logarithm of the likelihood with it over that without it. For more
        it is the best linear estimate of whether each takes part, also where others do.
        """
        rest: Scores = self.towards - self.overlap.sum(axis=1) / 2
        if len(rest) == 1:
            return rest
        inside = self.overlap + np.eye(len(rest)) / _PRIOR
        return np.asarray(np.linalg.solve(inside, rest), np.float64)


@dataclass(frozen=True)
class Attacker:
    """Knows the model, the canaries and every setting, and adds up what each view tells.

    A score is a logarithm of a likelihood ratio: exact for one canary, one step and plain SGD. With
    more steps or another optimizer it is an approximation, and the attack is weaker than the best
    one. A bound holds for any score.

    Parameters
    ----------
    trainer : LocalTrainer
        The attacker's own copy of the model.
    units : Sequence[AuditRecords]
        The canaries of each client whose mechanism this is, all present.
    noise_multiplier, clip_norm, sample_rate : float
        σ, C and q of the mechanism, which are public.
    weights : ClipWeights
        The weights of the parts in the clip, which are public as well.
    """

    trainer: LocalTrainer
    units: Sequence[AuditRecords]
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    weights: ClipWeights = EVEN
    # Directions that do not depend on the model.
    _known: dict[object, Mapping[str, Gradients]] = field(default_factory=dict)

    def upload(
        self, server_round: int, plan: ComponentPlan, start: Arrays, sent: Arrays, batch: float
    ) -> View:
        """Return one client's round as the server sees it.

        Parameters
        ----------
        server_round : int
            The round, from 1.
        plan : ComponentPlan
            The factors that trained at each local step.
        start, sent : Mapping[str, ndarray]
            The arrays that the server sent, and those that came back.
        batch : float
            Expected batch size.
        """
        trainer = self.trainer
        rates = OptimizerSettings.in_round(trainer.config, server_round).rates
        seen: dict[str, NDArray[np.float64]] = {}
        for name, array in sent.items():
            if name in start and (rate := rates[factor_of(name)]):
                change = start[name].astype(np.float64) - array
                seen[name] = change * (batch * self.weights.of(name) / (rate * self.clip_norm))
        steps = Counter(
            trainer.layout.active(plan, step) for step in range(1, trainer.config.local_steps + 1)
        )
        return View(start, seen, steps)

    def evidence(self, view: View) -> Evidence:
        """Return what a view says of the canaries."""
        signal: dict[str, NDArray[np.float64]] = {}
        noises: Counter[str] = Counter()  # How often an array got noise.
        for active, times in view.steps.items():
            for name, part in self._directions(active, view.start).items():
                signal[name] = signal.get(name, 0.0) + times * part
                noises[name] += times
        count = sum(len(unit) for unit in self.units)
        found = Evidence(np.zeros(count), np.zeros((count, count)))
        for name in signal.keys() & view.seen.keys():
            rows = signal[name].reshape(count, -1)
            variance = self.noise_multiplier**2 * noises[name]
            found += Evidence(rows @ view.seen[name].ravel() / variance, rows @ rows.T / variance)
        return found

    def score(self, view: View) -> float:
        """Return how much one view speaks for the only canary, which may not have joined it."""
        ratio = float(self.evidence(view).scores[0])
        joins = self.sample_rate
        if sum(view.steps.values()) == 1 and joins < 1:
            return float(np.logaddexp(math.log1p(-joins), math.log(joins) + ratio))
        return ratio

    def loss(self, arrays: Arrays) -> float:
        """Return the loss of the first canary under a model: all that a black box tells."""
        trainer = self.trainer
        trainer.load({**trainer.start, **arrays})
        with torch.no_grad():
            batch = self.units[0].batch(torch.zeros(1, dtype=torch.int64))
            return float(trainer.task.losses(trainer.adapted.model, batch)[0])

    def _directions(self, active: tuple[str, ...], start: Arrays) -> Mapping[str, Gradients]:
        """Return the canaries' weighted, clipped gradients over C, by array, shape (k, …)."""
        if not all(unit.directed for unit in self.units):
            return self._computed(active, start)
        shapes = tuple(start[name].shape for name in active if name in start)
        if (active, shapes) not in self._known:
            self._known[active, shapes] = self._computed(active, start)
        return self._known[active, shapes]

    def _computed(self, active: tuple[str, ...], start: Arrays) -> Mapping[str, Gradients]:
        self.trainer.load({**self.trainer.start, **start})
        rows: dict[str, list[Gradients]] = {name: [] for name in active}
        for unit in self.units:
            if len(unit):
                every = torch.arange(len(unit))
                made = self.trainer.engine.gradients_by_record(unit, every, active)
                for name, row in made.items():
                    rows[name].append(row.detach().cpu().double().numpy())
        found = {n: self.weights.of(n) * np.concatenate(parts) for n, parts in rows.items()}
        squares = sum((part**2).reshape(len(part), -1).sum(axis=1) for part in found.values())
        length = np.maximum(np.sqrt(squares), self.clip_norm)
        return {
            name: part / length.reshape(-1, *[1] * (part.ndim - 1)) for name, part in found.items()
        }
