"""What a client's loop of private steps draws, and that it does nothing but take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora_flwr.clients import trainer as trainer_module
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.errors import PrivacyViolation
from fedlora_flwr.layout import factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.masks import own_randomness
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.randomness import stream_seed
from tests.conftest import MakeConfig

Arrays = Mapping[str, NDArray[np.float32]]
BOTH = ComponentPlan.parse("*")
SPARSE = Mechanism(1.0, 1.0, 1, 100)  # Every third batch is empty.
SEED = 42


@pytest.fixture
def trainer(make_config: MakeConfig) -> LocalTrainer:
    rates = {"lr_a": 0.5, "lr_b": 0.25, "lr_head": 0.125}
    return LocalTrainer.build(make_config(seed=SEED, local_steps=1, lora_dropout=0.0, **rates))


def seed(purpose: str, stream: tuple[object, ...]) -> int:
    return stream_seed(SEED, purpose, *stream)


def streams(mechanism: Mechanism, *sizes: int) -> Iterator[tuple[object, ...]]:
    """Find streams whose batches have these sizes."""
    for number in range(10_000):
        drawn = poisson_batches(mechanism, len(sizes), seed("batches", ("client", number)))
        if tuple(len(batch) for batch in drawn) == sizes:
            yield ("client", number)


def train(
    trainer: LocalTrainer,
    stream: tuple[object, ...],
    mechanism: Mechanism = SPARSE,
    records: Any = None,
) -> Arrays:
    given = trainer.task.client_records(0, 3) if records is None else records
    return trainer.train(trainer.start, BOTH, given, mechanism, stream).arrays


def noise_of(trainer: LocalTrainer, found: Arrays) -> NDArray[np.float64]:
    """Return b over C times the gradient of the only step, in the optimizer's order."""
    moved = {n: trainer.start[n].astype(np.float64) - array for n, array in found.items()}
    return np.concatenate(
        [
            moved[name].ravel() / rate
            for factor, rate in (("A", 0.5), ("B", 0.25), (None, 0.125))
            for name in moved
            if factor_of(name) == factor
        ]
    )


def test_an_empty_batch_is_a_step_of_the_noise_streams_own_noise(trainer: LocalTrainer) -> None:
    stream = next(streams(SPARSE, 0))
    noise = noise_of(trainer, train(trainer, stream))

    expected = SeededNoise(seed("noise", stream)).normal_like(torch.zeros(len(noise)))
    np.testing.assert_allclose(noise, expected.numpy(), rtol=0, atol=1e-5)
    others = [seed("batches", stream), seed("dropout", stream), seed("noise", stream) % 2**32]
    for other in others:
        drawn = SeededNoise(other).normal_like(torch.zeros(len(noise))).numpy()
        assert abs(np.corrcoef(noise, drawn)[0, 1]) < 0.2


@pytest.mark.parametrize("purpose", ["noise", "batches", "dropout"])
def test_streams_of_a_real_run_follow_128_bits_of_the_operating_system(
    trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    """Of two entropies that share all but their highest bits, each gives its own stream."""
    config = replace(trainer.config, reproducible=False, lora_dropout=0.0)
    secret = replace(trainer, config=config)
    found = []
    for high in (0, 1):
        drawn = bytes([high]) + bytes(range(1, 16))
        monkeypatch.setattr("fedlora_flwr.randomness.os.urandom", lambda n, d=drawn: d[:n])
        if purpose == "noise":
            found.append(secret._noise(("c", 1)).normal_like(torch.zeros(20)).tolist())
        elif purpose == "batches":
            batches = poisson_batches(SPARSE, 9, secret._seed("batches", ("c", 1)))
            found.append([batch.tolist() for batch in batches])
        else:
            with trainer_module.one_client(1, secret._seed("dropout", ("c", 1))):
                found.append(torch.rand(20).tolist())
    assert found[0] != found[1]


def by_hand(
    trainer: LocalTrainer,
    stream: tuple[object, ...],
    mechanism: Mechanism,
    records: Any,
    steps: int,
) -> Arrays:
    """Take the planned steps one by one at the configured rates, and nothing else."""
    trainer.load(trainer.start)
    engine = trainer.engine
    with own_randomness(seed("dropout", stream)):
        engine.start_round(
            mechanism,
            OptimizerSettings.in_round(trainer.config, 1),
            SeededNoise(seed("noise", stream)),
        )
        for batch in poisson_batches(mechanism, steps, seed("batches", stream)):
            engine.step(records, batch, trainer.layout.active(BOTH, 1))
    return trainer.adapted.read()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_round_is_the_planned_steps_at_the_configured_rates_bit_for_bit(
    make_config: MakeConfig, dropout: float
) -> None:
    trainer = LocalTrainer.build(make_config(seed=SEED, local_steps=4, lora_dropout=dropout))
    records = trainer.task.client_records(0, 3)
    trainer.engine.verify(records)
    mechanism = Mechanism(0.5, 1.0, 2, 100)
    stream = next(streams(mechanism, 2, 0, 3, 1))

    expected = by_hand(trainer, stream, mechanism, records, 4)
    found = train(trainer, stream, mechanism, records)

    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_records_that_did_not_join_change_no_bit(trainer: LocalTrainer) -> None:
    records = trainer.task.client_records(0, 3)
    whole = records.batch(torch.arange(len(records)))
    stream = next(streams(SPARSE, 0))
    harder = TensorRecords({"image": 9 * whole["image"], "label": (whole["label"] + 3) % 10})

    first, second = train(trainer, stream), train(trainer, stream, records=harder)

    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_arrays_of_a_server_that_is_not_trusted_are_looked_at_each_time(
    trainer: LocalTrainer,
) -> None:
    """A process that has looked once looks again at what came since."""
    records = trainer.task.client_records(0, 3)
    train(trainer, ("client", 0))
    seen: list[int] = []

    def mixing(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(batch["label"]))
        losses = trainer.task.losses(model, batch)
        return losses + 0.1 * losses.detach().mean() * losses

    engine = PrivateEngine(trainer.adapted, mixing)
    engine._verified = True
    watched = replace(trainer, engine=engine)
    stream = next(streams(SPARSE, 1))
    train(watched, stream)
    with pytest.raises(PrivacyViolation, match="other records"):
        watched.train(trainer.start, BOTH, records, SPARSE, stream, untrusted=True)
    assert max(seen) > 1
