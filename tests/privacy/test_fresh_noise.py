"""No noise is drawn twice: by another step, client, factor, round, process, fork or copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy import noise as noise_module
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedlora_flwr.secure_sum.discrete_gaussian import discrete_gaussian
from fedlora_flwr.secure_sum.grid import Grid
from tests.conftest import MakeConfig
from tests.models import PLAIN_SGD, VIT, active, engine_of, values
from tests.server.resuming import begin, tiny
from tests.support.forks import forked, trains_in_forks

NOTHING = torch.tensor([], dtype=torch.int64)
LIKE = torch.zeros(50, dtype=torch.float64)
HALF = Mechanism(1.0, 1.0, 50, 100)


def drawn(source: NoiseSource) -> bytes:
    return source.normal_like(LIKE).numpy().tobytes()


def positions(batches: Iterator[torch.Tensor]) -> bytes:
    return b"".join(batch.numpy().tobytes() + b"." for batch in islice(batches, 3))


def assert_children_are_alone(work: Callable[[], bytes]) -> None:
    """Two forks of this process, and this process itself, each make something else."""
    assert len({forked(work), forked(work), work()}) == 3


fresh = pytest.mark.parametrize(
    "make", [lambda: SeededNoise(None), SecureNoise], ids=["default", "secure"]
)


# --- a process that was forked ---


@fresh
@pytest.mark.parametrize("used", [False, True])
def test_a_fork_does_not_draw_its_parents_noise(
    make: Callable[[], NoiseSource], used: bool
) -> None:
    source = make()
    if used:
        drawn(source)
    assert_children_are_alone(lambda: drawn(source))


def test_a_fork_of_a_fork_does_not_draw_its_grandparents_noise() -> None:
    source = SeededNoise(None)
    drawn(source)
    grandchild = forked(lambda: forked(lambda: drawn(source)))
    assert len({grandchild, forked(lambda: drawn(source)), drawn(source)}) == 3


def test_noise_with_a_seed_goes_on_in_a_fork() -> None:
    """So the tests above would see noise that is drawn twice."""
    source = SeededNoise(3)
    drawn(source)
    assert forked(lambda: drawn(source)) == drawn(source)


def test_a_fork_does_not_draw_its_parents_batches() -> None:
    batches = poisson_batches(HALF, 9, None)
    next(batches)
    assert_children_are_alone(lambda: positions(batches))


def test_batches_with_a_seed_go_on_in_a_fork() -> None:
    batches = poisson_batches(HALF, 9, 5)
    next(batches)
    assert forked(lambda: positions(batches)) == positions(batches)


@fresh
@trains_in_forks
def test_an_engine_that_was_forked_between_two_steps_takes_its_own(
    make: Callable[[], NoiseSource],
) -> None:
    engine, records = engine_of(VIT), VIT.records(4)
    names = active(engine.adapted, "*")
    engine.start_round(Mechanism(1.0, 1.0, 1, 4), PLAIN_SGD, make())
    engine.step(records, NOTHING, names)

    def next_step() -> bytes:
        engine.step(records, NOTHING, names)
        return b"".join(p.numpy().tobytes() for p in values(engine.adapted).values())

    assert_children_are_alone(next_step)


@pytest.mark.parametrize("changes", [{}, {"secure_noise": True}, {"lora_dropout": 0.1}])
@trains_in_forks
def test_a_client_that_was_forked_in_its_round_makes_its_own_upload(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    trainer = LocalTrainer.build(make_config(reproducible=False, local_steps=3, **changes))
    records, step = trainer.task.client_records(0, 3), trainer.engine.step
    uploads: list[bytes] = []

    def rest() -> bytes:
        """Take the two steps that are left, as the loop below does in this process."""
        for indices in islice(batches[0], 2):
            step(records, indices, tuple(trainer.adapted.parameters))
        return b"".join(array.tobytes() for array in trainer.adapted.read().values())

    batches: list[Iterator[torch.Tensor]] = []
    draw = poisson_batches

    def kept(*args: Any) -> Iterator[torch.Tensor]:
        batches.append(draw(*args))
        return batches[0]

    def forking(*args: Any) -> None:
        step(*args)
        if not uploads:
            uploads.extend(forked(rest) for _ in range(2))

    monkeypatch.setattr("fedlora_flwr.clients.trainer.poisson_batches", kept)
    monkeypatch.setattr(trainer.engine, "step", forking)
    mechanism = Mechanism(1.0, 1.0, 8, len(records))
    made = trainer.train(trainer.start, ComponentPlan.parse("*"), records, mechanism, ("c", 1))
    uploads.append(b"".join(array.tobytes() for array in made.arrays.values()))
    assert len(set(uploads)) == 3


# --- a copy ---


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_does_not_draw_what_its_original_draws(copied: Callable[[Any], Any]) -> None:
    source, seeded = SeededNoise(None), SeededNoise(3)
    drawn(source), drawn(seeded)
    assert len({drawn(copied(source)), drawn(copied(source)), drawn(source)}) == 3
    if copied is not copy.copy:  # Both halves of a shallow copy would draw in turn.
        assert drawn(copied(seeded)) == drawn(seeded)


# --- steps, rounds, clients and factors of one simulation ---

SUM = {"trust_model": "secure-sum", "sample_rate": 0.25, "local_steps": 1}
RUNS: dict[str, dict[str, Any]] = {
    "seeded": {},
    "default": {"reproducible": False},
    "secure": {"reproducible": False, "secure_noise": True},
    "sum": {**SUM, "reproducible": False},
    "seeded sum": SUM,
}
WIDTH = 4


@pytest.mark.parametrize("name", RUNS)
def test_no_noise_of_a_simulation_is_used_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No four draws in a row come again, at any other place: A, B, head, step, client, round."""
    seen: list[NDArray[Any]] = []
    watch(monkeypatch, seen)
    config = tiny(tmp_path, strategy="dp-lora", **RUNS[name])
    begin(config, tmp_path / "run")

    calls = config.num_clients * config.num_rounds * config.local_steps
    assert len(seen) >= calls
    rows = np.lib.stride_tricks.sliding_window_view(np.concatenate(seen), WIDTH)
    assert len(np.unique(rows, axis=0)) == len(rows)


def watch(monkeypatch: pytest.MonkeyPatch, seen: list[NDArray[Any]]) -> None:
    """Keep all noise that clients draw from now on."""
    for kind in (noise_module.SeededNoise, noise_module.SecureNoise):
        real = kind.normal_like

        def normal_like(self: Any, reference: torch.Tensor, real: Any = real) -> torch.Tensor:
            found: torch.Tensor = real(self, reference)
            seen.append(found.numpy().ravel())
            return found

        monkeypatch.setattr(kind, "normal_like", normal_like)

    def noise(self: Grid, *args: Any) -> NDArray[np.int64]:
        found = share(self, *args)
        seen.append(found.ravel())
        return found

    share = Grid.noise
    monkeypatch.setattr(Grid, "noise", noise)


def test_discrete_noise_of_a_fork_is_its_own() -> None:
    assert_children_are_alone(lambda: discrete_gaussian(1000, 50).tobytes())
