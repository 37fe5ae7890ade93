"""AS-LoRA's scores say nothing of private records beyond the privatized gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import NoiseSource, SeededNoise
from fedlora_flwr.strategies import ASLoRA, Upload
from fedlora_flwr.strategies.choices import Choice
from tests.clients.asking import Asker
from tests.conftest import MakeConfig

MECHANISM = Mechanism(0.8, 1.0, 8, 60)
STD = 0.8


class Honest:
    """Seeded noise that keeps the noisy sums that it makes."""

    def __init__(self, seed: int) -> None:
        self._noise = SeededNoise(seed)
        self.sums: list[Tensor] = []

    def normal_like(self, reference: Tensor) -> Tensor:
        drawn = self._noise.normal_like(reference)
        self.sums.append(reference + STD * drawn)
        return drawn


class Rigged:
    """Noise that turns other clipped sums into the same noisy ones."""

    def __init__(self, sums: list[Tensor]) -> None:
        self._sums: Iterator[Tensor] = iter(sums)
        self.drawn: list[Tensor] = []

    def normal_like(self, reference: Tensor) -> Tensor:
        self.drawn.append((next(self._sums) - reference) / STD)
        return self.drawn[-1]


@dataclass(frozen=True, eq=False)
class OwnNoise(LocalTrainer):
    """A trainer whose noise a test brings along."""

    source: list[NoiseSource] = field(default_factory=list)

    def _noise(self, stream: tuple[object, ...]) -> NoiseSource:
        del stream
        return self.source[-1]


def double_precision(make_config: MakeConfig, **changes: Any) -> OwnNoise:
    trainer = LocalTrainer.build(make_config(local_steps=4, lr_a=0.3, lr_b=0.2, **changes))
    task, adapted = trainer.task, trainer.adapted
    adapted.model.double()

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return task.losses(model, {**batch, "image": batch["image"].double()})

    return OwnNoise(
        trainer.config, task, adapted, PrivateEngine(adapted, losses), trainer.start, source=[]
    )


def start_of(trainer: LocalTrainer) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.1, tuple(p.shape)) for name, p in trainer.adapted.parameters.items()
    }


def private(seed: int) -> TensorRecords:
    """Return private records that share nothing with those of another seed but their number."""
    generator = torch.Generator().manual_seed(seed)
    return TensorRecords(
        {
            "image": torch.rand(60, 1, 8, 8, generator=generator),
            "label": torch.randint(0, 10, (60,), generator=generator),
        }
    )


def scores_of(trainer: OwnNoise, noises: list[NoiseSource], seed: int, **settings: Any) -> Any:
    """Run three rounds of two clients whose records follow from a seed; return all scores."""
    strategy = ASLoRA(warm_up=0.0, local_steps=4, lr_a=0.3, lr_b=0.2, **settings)
    strategy.num_rounds, current, found = 3, start_of(trainer), []
    for server_round in range(1, 4):
        strategy.plan(server_round, trainer.layout)
        # The same factors in two rounds that follow each other, whatever scores say.
        plan = ComponentPlan.parse("BABA")
        uploads = []
        for client in range(2):
            trainer.source.append(noises.pop(0))
            records = private(100 * seed + client)
            update = trainer.train(current, plan, records, MECHANISM, (client, server_round))
            uploads.append(Upload(f"client-{client}", update.arrays, 1.0, {}))
        strategy._choices = [Choice(mode) for mode in plan.steps[0]]
        current = dict(strategy.aggregate(server_round, current, uploads))
        found.append([(s.gains[f].mean, s.bends[f].mean) for s in strategy.scores for f in "AB"])
    return np.array(found, dtype=float)


@pytest.mark.parametrize("curvature", ["none", "secant"])
def test_other_records_with_the_same_released_gradients_give_the_same_scores(
    make_config: MakeConfig, curvature: str
) -> None:
    trainer = double_precision(make_config)
    honest = [Honest(number) for number in range(6)]
    first = scores_of(trainer, list(honest), 1, curvature=curvature)
    rigged = [Rigged(noise.sums) for noise in honest]
    second = scores_of(trainer, list(rigged), 2, curvature=curvature)
    unrigged = scores_of(trainer, [Honest(number) for number in range(6)], 2, curvature=curvature)

    np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-8)
    assert np.isfinite(first[-1, :, 0]).sum() == 4
    assert np.isfinite(first[-1, :, 1]).sum() == (4 if curvature == "secant" else 0)
    # Not because the records made no difference.
    assert all(len(r.drawn) == len(h.sums) for r, h in zip(rigged, honest, strict=True))
    assert np.nanmax(abs(unrigged / first - 1)) > 0.05


def test_a_client_reports_nothing_beside_its_arrays(make_config: MakeConfig) -> None:
    """An order for scores is refused, and a plan by block brings back what any plan does."""
    reply = Asker(make_config()).train("BABA")
    whole = Asker(make_config(), run_id=2).train("*")
    for kind in ("metrics", "config"):
        assert {*reply[kind]} == {*whole[kind]}
    reason = Asker(make_config(), run_id=3).error(plan="B", server_round=1, curvature="none")
    assert "'curvature'" in reason
