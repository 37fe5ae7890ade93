"""A client's part of a secure sum: clipped gradients of its sample in whole numbers, and noise."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.secure_sum.grid import Grid, opened
from fedlora_flwr.secure_sum.rounding import rounded
from tests.conftest import MakeConfig
from tests.models import (
    FAMILIES,
    PLAIN_SGD,
    VIT,
    Family,
    active,
    engine_of,
    loop_gradients,
    update,
    values,
)
from tests.secure_sum.rounds import add_shares

NORM = 2**20


def whole_sum(
    engine: PrivateEngine, family: Family, indices: Sequence[int], mode: str, clip: float
) -> dict[str, Tensor]:
    records = family.records(6)
    engine.start_round(Mechanism(0.0, clip, 2.5, 6), PLAIN_SGD, SeededNoise(0))
    chosen = torch.tensor(indices, dtype=torch.int64)
    names = active(engine.adapted, mode)
    return engine.whole_sum(records, chosen, names, lambda rows: rounded(rows, clip, NORM))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("mode", ["A", "B", "*"])
def test_the_whole_sum_is_that_of_gradients_clipped_one_by_one(family: Family, mode: str) -> None:
    engine, clip, indices = engine_of(family, microbatch=2), 0.05, [0, 2, 3, 5]
    before = values(engine.adapted)

    found = whole_sum(engine, family, indices, mode, clip)

    gradients = loop_gradients(family, family.plain(), family.records(6), indices)
    rows = {name: gradients[name].flatten(1).double() for name in found}
    norms = torch.cat(list(rows.values()), dim=1).norm(dim=1, keepdim=True)
    factors = (clip / norms).clamp(max=1)
    size = max(float(norms.max()), clip)
    for name, part in found.items():
        expected = (rows[name] * factors).sum(dim=0).view(part.shape) / clip * NORM
        assert part.dtype == torch.int64
        # √D/2 and one unit of the norm are given up, and fp32 gradients are off by some 1e-6.
        assert part.double() == pytest.approx(expected, abs=NORM * (2e-3 + 1e-5 * size))
    after = values(engine.adapted)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_one_record_moves_the_sum_by_the_grid_norm_at_most_and_exactly_that_far() -> None:
    engine, clip = engine_of(VIT), 1e-3

    all_of_them = whole_sum(engine, VIT, [0, 1, 2, 3], "*", clip)
    without = whole_sum(engine, VIT, [0, 1, 3], "*", clip)

    square = sum(int(((all_of_them[n] - without[n]) ** 2).sum()) for n in without)
    assert 0.99 * NORM**2 < square <= NORM**2


def test_an_empty_sample_is_a_sum_of_zero() -> None:
    found = whole_sum(engine_of(VIT), VIT, [], "B", 1.0)

    assert found
    assert not any(part.any() for part in found.values())
    assert {factor_of(name) for name in found} == {"B", None}


def test_a_step_after_a_sum_is_what_it_was_before() -> None:
    engine, mechanism = engine_of(VIT), Mechanism(0.0, 1.0, 2, 6)
    before = update(engine, VIT.records(6), [0, 1], "B", mechanism)

    whole_sum(engine, VIT, [2, 3], "A", 1.0)

    after = update(engine, VIT.records(6), [0, 1], "B", mechanism)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def trainer(make_config: MakeConfig) -> LocalTrainer:
    return LocalTrainer.build(make_config(local_steps=1, reproducible=True))


def test_shares_of_three_clients_open_to_their_clipped_sums_and_the_noise_of_all(
    trainer: LocalTrainer,
) -> None:
    plan, grid = ComponentPlan.parse("B"), Grid.of(3.0, 3, 2**18)
    alone = Grid(2**18, 4, 3)  # As good as no noise.
    uploads, quiet = [], []
    for client in range(3):
        records = trainer.task.client_records(client, 3)
        mechanism = Mechanism(3.0, 1.0, 0.1 * len(records), len(records))
        given = trainer.start, plan, records, mechanism
        uploads.append(trainer.share(*given, grid, ("client", client)))
        quiet.append(trainer.share(*given, alone, ("client", client)))

    noise = np.concatenate(
        [
            (
                opened(add_shares(u[name] for u in uploads))
                - opened(add_shares(q[name] for q in quiet))
            )
            for name in uploads[0]
        ],
        axis=None,
    )

    assert {factor_of(name) for name in uploads[0]} == {"B", None}
    assert all(part.dtype == np.uint32 for part in uploads[0].values())
    assert noise.std() == pytest.approx(3.0 * 2**18, rel=6 / np.sqrt(2 * noise.size))


def test_noise_follows_the_seed_only_where_the_run_is_reproducible(
    trainer: LocalTrainer, make_config: MakeConfig
) -> None:
    def made(config: object = trainer.config, stream: str = "one") -> bytes:
        own = LocalTrainer.build(config) if config is not trainer.config else trainer  # type: ignore[arg-type]
        records = own.task.client_records(0, 3)
        mechanism = Mechanism(1.0, 1.0, 2, len(records))
        grid, plan = Grid.of(1.0, 2, 2**16), ComponentPlan.parse("B")
        found = own.share(own.start, plan, records, mechanism, grid, (stream,))
        return b"".join(part.tobytes() for part in found.values())

    secret = make_config(local_steps=1, reproducible=False)
    assert made() == made()
    assert made() != made(stream="another")
    assert made(secret) != made(secret)


def test_noise_is_fresh_where_the_run_is_not_reproducible(make_config: MakeConfig) -> None:
    """All records join here, so two uploads to the same round differ in their noise alone."""
    trainer = LocalTrainer.build(make_config(local_steps=1, reproducible=False))
    records, plan = trainer.task.client_records(0, 3), ComponentPlan.parse("B")
    mechanism = Mechanism(1.0, 1.0, len(records), len(records))
    grid = Grid.of(1.0, 2, 2**16)

    one, other = (
        trainer.share(trainer.start, plan, records, mechanism, grid, ("one", 1)) for _ in range(2)
    )

    differing = np.concatenate([(one[name] != other[name]).ravel() for name in one])
    assert differing.mean() > 0.99
