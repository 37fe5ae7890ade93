"""The attacker: the server, who sees each upload, and guesses whether the canary was there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora_flwr.audit.canaries import WeightedRecords
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings

Arrays = Mapping[str, NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Upload:
    """One client's round, as the server sees it.

    Parameters
    ----------
    server_round : int
        The round, from 1.
    plan : ComponentPlan
        The factors that trained at each local step.
    start, sent : Mapping[str, ndarray]
        The arrays that the server sent, and those that came back.
    """

    server_round: int
    plan: ComponentPlan
    start: Arrays
    sent: Arrays


@dataclass(frozen=True)
class Attacker:
    """Knows the model, the canary and every setting, and adds up what each upload tells.

    The score of an upload is the logarithm of its likelihood with the canary over that without it,
    exact for one step of plain SGD. With more steps, or another optimizer, it is an approximation,
    and the attack is weaker than the best one. A bound holds for any score.

    Parameters
    ----------
    trainer : LocalTrainer
        The attacker's own copy of the model.
    mechanism : Mechanism
        The client's mechanism, which is public.
    canary : WeightedRecords
        Records of which the first is the canary, present.
    """

    trainer: LocalTrainer
    mechanism: Mechanism
    canary: WeightedRecords

    def score(self, upload: Upload) -> float:
        """Return how much an upload speaks for the canary: a log likelihood ratio."""
        steps = [
            self.trainer.layout.active(upload.plan, step)
            for step in range(1, self.trainer.config.local_steps + 1)
        ]
        self.trainer.load({**self.trainer.start, **upload.start})
        settings = OptimizerSettings.in_round(self.trainer.config, upload.server_round)
        unit, deviation = self.mechanism, self.mechanism.noise_multiplier
        expected: Counter[str] = Counter()
        moved: dict[str, Any] = {}
        for active in steps:
            for name, part in self._direction(active).items():
                moved[name] = moved.get(name, 0.0) + part
            expected.update(active)
        ratio = 0.0
        for name in moved.keys() & upload.sent.keys():
            rate = settings.rates[factor_of(name)]
            if not rate:
                continue
            change = np.float64(upload.start[name]) - np.float64(upload.sent[name])
            seen = change * unit.batch_size / (rate * unit.clip_norm)
            likely = float((seen * moved[name]).sum() - (moved[name] ** 2).sum() / 2)
            ratio += likely / (deviation**2 * expected[name])
        rate = self.mechanism.sample_rate
        if len(steps) == 1 and rate < 1:
            return float(np.logaddexp(math.log1p(-rate), math.log(rate) + ratio))
        return ratio

    def _direction(self, active: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
        """Return the canary's clipped gradient over C, by array."""
        engine, first = self.trainer.engine, torch.zeros(1, dtype=torch.int64)
        found = {
            name: gradient[0].detach().cpu().double().numpy()
            for name, gradient in engine.gradients_by_record(self.canary, first, active).items()
        }
        norm = math.sqrt(sum(float((part**2).sum()) for part in found.values()))
        length = max(norm, self.mechanism.clip_norm)
        return {name: part / length for name, part in found.items()}
