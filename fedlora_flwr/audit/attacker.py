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
        trainer, mechanism = self.trainer, self.mechanism
        steps = Counter(
            trainer.layout.active(upload.plan, step)
            for step in range(1, trainer.config.local_steps + 1)
        )
        trainer.load({**trainer.start, **upload.start})
        rates = OptimizerSettings.in_round(trainer.config, upload.server_round).rates
        signal: dict[str, Any] = {}
        noises: Counter[str] = Counter()  # How often an array got noise.
        for active, times in steps.items():
            for name, part in self._direction(active).items():
                signal[name] = signal.get(name, 0.0) + times * part
                noises[name] += times
        ratio = 0.0
        for name in signal.keys() & upload.sent.keys():
            if rate := rates[factor_of(name)]:
                change = np.float64(upload.start[name]) - np.float64(upload.sent[name])
                seen = change * mechanism.batch_size / (rate * mechanism.clip_norm)
                likely = float((seen * signal[name]).sum() - (signal[name] ** 2).sum() / 2)
                ratio += likely / (mechanism.noise_multiplier**2 * noises[name])
        joins = mechanism.sample_rate
        if steps.total() == 1 and joins < 1:
            return float(np.logaddexp(math.log1p(-joins), math.log(joins) + ratio))
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
