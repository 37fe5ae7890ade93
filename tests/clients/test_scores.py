"""Scores of blocks say nothing of private records beyond the privatised gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedlora_flwr.clients.trainer import LocalUpdate, Trainer, plan_mechanism
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import NoiseSource, SeededNoise
from fedlora_flwr.strategies import ASLoRA, FedLoRA
from fedlora_flwr.strategies.replies import size_of, to_record
from fedlora_flwr.tasks.records import TensorRecords
from fedlora_flwr.wire.records import read_training
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
class OwnNoise(Trainer):
    """A trainer whose noise a test brings along."""

    source: list[NoiseSource] = field(default_factory=list)

    def _noise(self, stream: tuple[object, ...]) -> NoiseSource:
        del stream
        return self.source[-1]


def double_precision(make_config: MakeConfig, **changes: Any) -> OwnNoise:
    trainer = Trainer.build(make_config(local_steps=4, lr_a=0.3, lr_b=0.2, **changes))
    task, adapted = trainer.task, trainer.adapted
    adapted.model.double()

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return task.losses(model, {**batch, "image": batch["image"].double()})

    return OwnNoise(
        trainer.config, task, adapted, PrivateEngine(adapted, losses), trainer.start, []
    )


def start_of(trainer: Trainer) -> dict[str, Any]:
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


def train(
    trainer: OwnNoise, noise: NoiseSource, records: TensorRecords, plan: str, curvature: str
) -> LocalUpdate:
    trainer.source.append(noise)
    parsed = ComponentPlan.parse(plan)
    return trainer.train(start_of(trainer), parsed, records, MECHANISM, ("me", 1), curvature)


@pytest.mark.parametrize("curvature", ["none", "secant"])
@pytest.mark.parametrize("plan", ["B", "A", "BAAB", "*"])
def test_other_records_with_the_same_released_gradients_give_the_same_scores(
    make_config: MakeConfig, plan: str, curvature: str
) -> None:
    trainer = double_precision(make_config)
    honest = Honest(1)
    first = train(trainer, honest, private(1), plan, curvature)
    rigged = Rigged(honest.sums)
    second = train(trainer, rigged, private(2), plan, curvature)
    unrigged = train(trainer, Honest(1), private(2), plan, curvature)

    assert first.scores is not None
    assert len(first.scores) == len(trainer.layout.blocks) == 4
    np.testing.assert_allclose(second.scores or [], first.scores, rtol=1e-9)
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        np.testing.assert_allclose(second.arrays[name], array, rtol=1e-6, atol=1e-7)
    # Not because the records made no difference.
    assert len(rigged.drawn) == len(honest.sums)
    assert not np.allclose(unrigged.scores or [], first.scores, rtol=1e-3)


@pytest.mark.parametrize("plan", ["B", "BAAB"])
def test_the_scores_are_the_debiased_energies_of_what_was_released(
    make_config: MakeConfig, plan: str
) -> None:
    trainer, noise = double_precision(make_config), Honest(3)
    found = train(trainer, noise, private(1), plan, "none").scores
    layout, config = trainer.layout, trainer.config
    active = layout.active(ComponentPlan.parse(plan), 1)
    order = [name for name in _optimizer_order(trainer) if name in active]
    sizes = [trainer.adapted.parameters[name].numel() for name in order]
    assert len(noise.sums) == 4
    expected = [0.0] * 4
    parts = [part for total in noise.sums for part in torch.split(total, sizes)]
    for name, total in zip(order * 4, parts, strict=True):
        if name not in layout.block_index:
            continue
        rate = config.lr_a if "lora_A" in name else config.lr_b
        energy = float((total / 8).square().sum()) - total.numel() * (STD * 1.0 / 8) ** 2
        expected[layout.block_index[name]] += rate * energy / 4
    np.testing.assert_allclose(found or [], expected, rtol=1e-9)


def _optimizer_order(trainer: Trainer) -> list[str]:
    names = list(trainer.adapted.parameters)
    factors = ["lora_A" in n for n in names], ["lora_B" in n for n in names]
    groups = [
        [n for n, a in zip(names, factors[0], strict=True) if a],
        [n for n, b in zip(names, factors[1], strict=True) if b],
    ]
    return [*groups[0], *groups[1], *(n for n in names if "lora_" not in n)]


def test_asking_for_scores_changes_no_array(make_config: MakeConfig) -> None:
    trainer = double_precision(make_config)
    plain, none, secant = (
        train(trainer, Honest(1), private(1), "BAAB", curvature)
        for curvature in ("", "none", "secant")
    )
    assert plain.scores is None
    assert none.scores != secant.scores
    for name, array in plain.arrays.items():
        assert array.tobytes() == none.arrays[name].tobytes() == secant.arrays[name].tobytes()


def replied(content: RecordDict) -> dict[str, Any]:
    return dict(content.metric_records["metrics"])


@pytest.mark.parametrize("curvature", ["none", "secant"])
def test_scores_travel_as_one_number_a_block(make_config: MakeConfig, curvature: str) -> None:
    config = make_config()
    content = Asker(config).train("BABA", curvature=curvature)
    scores = replied(content)["scores"]
    assert isinstance(scores, list)
    assert len(scores) == 4
    assert all(type(score) is float and np.isfinite(score) for score in scores)
    assert read_training(content).scores == tuple(scores)
    # The very numbers that the trainer found.
    trainer = Trainer.build(config)
    records = trainer.task.client_records(0, config.num_clients)
    expected = trainer.train(
        trainer.start,
        ComponentPlan.parse("BABA"),
        records,
        plan_mechanism(config, len(records)),
        ("partition-000000", 1),
        curvature,
    ).scores
    assert scores == expected
    arrays = content.array_records["arrays"].values()
    assert size_of(content) == sum(len(array.data) for array in arrays) + 4 * 8
    assert size_of(content, factors_only=True) < sum(len(array.data) for array in arrays)


def test_no_scores_leave_where_none_are_asked_for(make_config: MakeConfig) -> None:
    content = Asker(make_config()).train("BABA")
    assert "scores" not in replied(content)
    assert "scores" not in content.config_records["config"]
    assert read_training(content).scores is None


def test_an_exhausted_client_sends_no_scores(make_config: MakeConfig) -> None:
    asker = Asker(make_config(max_rounds=1))
    asker.train("B", 1, curvature="none")
    content = asker.train("B", 2, curvature="none")
    assert content.config_records["config"]["status"] == "budget-exhausted"
    assert "scores" not in replied(content)


def test_an_unknown_curvature_is_refused(make_config: MakeConfig) -> None:
    reason = Asker(make_config()).error(plan="B", server_round=1, curvature="hessian")
    assert "curvature = 'hessian'" in reason


def test_the_bytes_of_scores_are_counted(make_config: MakeConfig) -> None:
    config = make_config()

    def bytes_up(strategy: FedLoRA) -> tuple[int, int]:
        asker = Asker(config)
        with asker.grid.running() as grid:
            strategy.start(grid, to_record(asker.start), num_rounds=1)
        assert strategy.last_round is not None
        return strategy.last_round.bytes_up, strategy.last_round.bytes_up_adapters

    class Same(FedLoRA):
        def plan(self, server_round: int, layout: Any) -> ComponentPlan:
            return ComponentPlan.uniform("BBBB")

    plain, scored = bytes_up(Same()), bytes_up(ASLoRA())
    assert scored == (plain[0] + config.num_clients * 4 * 8, plain[1])


def test_each_factor_counts_at_its_own_rate(make_config: MakeConfig) -> None:
    trainer = double_precision(make_config)
    doubled = replace(trainer, config=replace(trainer.config, lr_a=0.6, local_steps=1))
    single = replace(trainer, config=replace(trainer.config, local_steps=1))
    usual = train(single, Honest(1), private(1), "BABA", "none").scores
    found = train(doubled, Honest(1), private(1), "BABA", "none").scores
    assert usual is not None
    np.testing.assert_allclose(
        found or [], np.array(usual) * np.array([1.0, 2.0, 1.0, 2.0]), rtol=1e-12
    )
