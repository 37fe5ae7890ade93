from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlora_flwr.clients.trainer import LocalTrainer, process_trainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.build import build_adapted, resolve_device
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.budget import Segment, calibrate, epsilon_spent
from fedlora_flwr.privacy.calibration import calibrated_mechanism
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.postprocessing.filters import FILTERS, make_filter
from fedlora_flwr.tasks.registry import build_task
from tests.conftest import MakeConfig

Arrays = Mapping[str, NDArray[np.float32]]
B_ONLY, ALTERNATING, BOTH = map(ComponentPlan.parse, ("B", "B/A", "*"))
MECHANISM = Mechanism(1.0, 1.0, 8, 100)
STREAM = ("client-3", 7)


@pytest.fixture
def trainer(make_config: MakeConfig) -> LocalTrainer:
    return LocalTrainer.build(make_config(local_steps=3, lora_dropout=0.1))


def run(
    trainer: LocalTrainer,
    plan: ComponentPlan = ALTERNATING,
    stream: tuple[object, ...] = STREAM,
    mechanism: Mechanism = MECHANISM,
    **changes: Any,
) -> Arrays:
    """Train one client from the same start, under a changed configuration."""
    start = start_of(trainer)
    records = trainer.task.client_records(0, 3)
    changed = replace(trainer, config=replace(trainer.config, **changes))
    return changed.train(start, plan, records, mechanism, stream).arrays


def start_of(trainer: LocalTrainer) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(0, 0.05, tuple(p.shape)).astype(np.float32)
        for name, p in trainer.adapted.parameters.items()
    }


def differing(first: Arrays, second: Arrays) -> set[str | None]:
    """Return the kinds of arrays that differ, after a check that each kind does as a whole."""
    assert first.keys() == second.keys()
    moved = {name for name in first if not np.array_equal(first[name], second[name])}
    kinds = {factor_of(name) for name in moved}
    assert moved == {name for name in first if factor_of(name) in kinds}
    return kinds


def test_one_stream_gives_one_result(trainer: LocalTrainer) -> None:
    first = run(trainer)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002 - the global generator is what must not matter
    run(trainer, stream=("another", 1))

    assert differing(first, run(trainer)) == set()
    assert differing(first, run(LocalTrainer.build(trainer.config))) == set()


@pytest.mark.parametrize("stream", [("client-4", 7), ("client-3", 8)])
@pytest.mark.parametrize(
    ("mechanism", "dropout"),
    [
        (Mechanism(1.0, 1.0, 20, 20), 0.0),
        (Mechanism(0.0, 1.0, 8, 100), 0.0),
        (Mechanism(0.0, 1.0, 20, 20), 0.5),
    ],
    ids=["noise", "batches", "dropout"],
)
def test_another_client_or_round_has_its_own(
    make_config: MakeConfig, stream: tuple[object, ...], mechanism: Mechanism, dropout: float
) -> None:
    trainer = LocalTrainer.build(make_config(lora_dropout=dropout))
    first, again, other = (run(trainer, BOTH, s, mechanism) for s in (STREAM, STREAM, stream))

    assert differing(first, again) == set()
    assert differing(first, other) == {"A", "B", None}


def test_another_seed_gives_another_result(trainer: LocalTrainer) -> None:
    assert differing(run(trainer), run(trainer, seed=43)) == {"A", "B", None}


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "none"])
def test_a_filter_acts_on_the_privatized_gradient_before_the_step(
    trainer: LocalTrainer, name: str
) -> None:
    start = start_of(trainer)
    one_step: dict[str, Any] = {"local_steps": 1, "lr_a": 1.0, "lr_b": 1.0, "lr_head": 1.0}
    plain, filtered = (run(trainer, BOTH, filter=f, **one_step) for f in ("none", name))

    expected = make_filter(name)
    for array, after in filtered.items():
        gradient = torch.from_numpy(start[array] - plain[array])
        step = torch.from_numpy(start[array] - after)
        torch.testing.assert_close(step, expected(array, gradient), rtol=1e-4, atol=1e-5)
    if name in ("binomial", "laplacian"):
        assert differing(plain, filtered) == {"A", "B"}


def test_a_temporal_filter_starts_anew_in_every_round(trainer: LocalTrainer) -> None:
    first, again = (run(trainer, BOTH, filter="ema", local_steps=3) for _ in range(2))
    assert differing(first, again) == set()
    assert differing(first, run(trainer, BOTH, local_steps=3)) == {"A", "B", None}


@pytest.mark.parametrize("secure", [False, True])
def test_without_reproducibility_every_result_differs(trainer: LocalTrainer, secure: bool) -> None:
    first, second = (run(trainer, reproducible=False, secure_noise=secure) for _ in range(2))

    assert differing(first, second) == {"A", "B", None}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_threads_and_the_global_generator_are_given_back(
    trainer: LocalTrainer, fails: bool
) -> None:
    state, seen = torch.get_rng_state(), []

    def losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if fails:
            raise MemoryError
        return trainer.task.losses(model, batch)

    watched = replace(trainer, engine=PrivateEngine(trainer.adapted, losses))
    with pytest.raises(MemoryError) if fails else nullcontext():
        run(watched, client_threads=1)

    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("plan", "steps", "kinds"),
    [
        (B_ONLY, 3, {"B", None}),
        (ComponentPlan.parse("A"), 2, {"A", None}),
        (BOTH, 1, {"A", "B", None}),
        (ALTERNATING, 1, {"B", None}),
        (ALTERNATING, 2, {"A", "B", None}),
    ],
)
def test_an_upload_holds_what_the_plan_trains_and_nothing_else(
    trainer: LocalTrainer, plan: ComponentPlan, steps: int, kinds: set[str | None]
) -> None:
    found, start = run(trainer, plan, local_steps=steps), start_of(trainer)

    assert list(found) == [name for name in start if factor_of(name) in kinds]
    assert all(array.dtype == np.float32 for array in found.values())
    assert not any(np.array_equal(array, start[name]) for name, array in found.items())
    for name, parameter in trainer.adapted.parameters.items():
        # What is not sent has not moved either.
        if name not in found:
            assert np.array_equal(parameter.detach().numpy(), start[name])


def test_a_plan_by_block_trains_each_blocks_own_factor(trainer: LocalTrainer) -> None:
    found = run(trainer, ComponentPlan.parse("BAB*"))

    factors = {
        block: {factor_of(name) for name in found if name.startswith(f"blocks.{block}.")}
        for block in range(4)
    }
    assert factors == {0: {"B"}, 1: {"A"}, 2: {"B"}, 3: {"A", "B"}}


def test_each_step_of_an_alternation_changes_one_factor(trainer: LocalTrainer) -> None:
    states: list[Arrays] = [start_of(trainer)]
    for steps in range(1, 5):
        # Streams do not depend on the number of steps, so each run goes on where the last ended.
        run(trainer, local_steps=steps)
        states.append(trainer.adapted.read())

    changes = [differing(before, after) for before, after in pairwise(states)]
    assert changes == [{"B", None}, {"A", None}, {"B", None}, {"A", None}]


def test_each_factor_has_its_own_learning_rate(trainer: LocalTrainer) -> None:
    start = start_of(trainer)
    slow = run(trainer, BOTH, local_steps=1, lr_a=0.1, lr_b=0.1, lr_head=0.1)
    fast = run(trainer, BOTH, local_steps=1, lr_a=0.2, lr_b=0.4, lr_head=0.8)

    times = {"A": 2.0, "B": 4.0, None: 8.0}
    for name, first in start.items():
        expected = times[factor_of(name)] * (slow[name] - first)
        np.testing.assert_allclose(fast[name] - first, expected, rtol=1e-3, atol=1e-5)


def test_microbatches_and_optimizer_come_from_the_configuration(make_config: MakeConfig) -> None:
    usual = {"local_steps": 2, "lr_a": 0.01, "lr_b": 0.01, "lr_head": 0.01}
    whole, parts, adam = (
        run(LocalTrainer.build(make_config(**usual, **changes)))
        for changes in ({}, {"microbatch_size": 3}, {"optimizer": "adamw"})
    )

    for name, array in whole.items():
        np.testing.assert_allclose(parts[name], array, rtol=0, atol=1e-5)
    assert differing(whole, adam) == {"A", "B", None}


def test_rates_follow_their_schedule_over_the_rounds(trainer: LocalTrainer) -> None:
    start, records = start_of(trainer), trainer.task.client_records(0, 3)
    config = replace(trainer.config, local_steps=1, num_rounds=5, lr_schedule="linear:0")
    changed = replace(trainer, config=replace(config, lr_schedule_head="constant"))
    moved = {}
    for server_round in (1, 3, 5):
        update = changed.train(
            start, BOTH, records, MECHANISM, STREAM, server_round=server_round
        ).arrays
        moved[server_round] = {name: update[name] - start[name] for name in start}

    for name, first in moved[1].items():
        half, none = (0.5, 0.0) if factor_of(name) else (1.0, 1.0)
        np.testing.assert_allclose(moved[3][name], half * first, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(moved[5][name], none * first, rtol=1e-3, atol=1e-6)


def test_without_a_clip_norm_the_step_is_the_sum_of_the_gradients(trainer: LocalTrainer) -> None:
    mechanism = Mechanism(0.0, math.inf, 8, 100)
    small, large, none = (
        run(trainer, BOTH, mechanism=replace(mechanism, clip_norm=norm), local_steps=1)
        for norm in (0.1, 1e6, math.inf)
    )
    start = start_of(trainer)
    for name in start:
        np.testing.assert_allclose(large[name], none[name], rtol=0, atol=1e-6)
    assert differing(small, none) == {"A", "B", None}
    assert calibrated_mechanism(
        replace(trainer.config, epsilon=math.inf, clip_norm=math.inf), 100
    ) == Mechanism(0.0, math.inf, trainer.config.batch_size, 100)


def test_arrays_that_miss_a_name_are_refused_by_that_name(trainer: LocalTrainer) -> None:
    start = dict(start_of(trainer))
    del start["head.bias"]

    with pytest.raises(InvalidValue, match=r"also \['head\.bias'\]"):
        trainer.train(start, BOTH, trainer.task.client_records(0, 3), MECHANISM, STREAM)


def test_arrays_of_another_model_are_refused(trainer: LocalTrainer) -> None:
    start = {**start_of(trainer), "blocks.9.attn.qkv.lora_A.weight": np.zeros((4, 48), np.float32)}

    with pytest.raises(InvalidValue, match=r"blocks\.9"):
        trainer.train(start, BOTH, trainer.task.client_records(0, 3), MECHANISM, STREAM)


def test_a_plan_for_another_number_of_blocks_is_refused(trainer: LocalTrainer) -> None:
    with pytest.raises(InvalidValue, match="1 or 4 modes per step"):
        run(trainer, ComponentPlan.parse("BAB"))


def test_every_client_gets_the_noise_that_its_size_needs(make_config: MakeConfig) -> None:
    config = make_config(epsilon=2.0, delta=1e-4, num_rounds=3)
    small, large = (calibrated_mechanism(config, n) for n in (200, 1000))

    assert small.noise_multiplier > 1.2 * large.noise_multiplier
    for mechanism, n in ((small, 200), (large, 1000)):
        assert (mechanism.num_records, mechanism.batch_size) == (n, 16)
        assert mechanism.clip_norm == config.clip_norm
        assert mechanism.noise_multiplier == calibrate(2.0, 1e-4, 16 / n, 6)
        spent = epsilon_spent([Segment(mechanism.noise_multiplier, 16 / n, 6)], 1e-4)
        assert 1.98 < spent.epsilon <= 2.0


@pytest.mark.parametrize(
    ("num_records", "key", "message"),
    [
        (15, "batch-size", "n = 15 records"),
        (1000, "delta", "below 1/n = 0.001"),
        (5000, "delta", "n = 5000 records"),
        (0, "num-records", "at least 1"),
    ],
)
def test_a_client_that_cannot_keep_the_promise_is_refused_by_name(
    make_config: MakeConfig, num_records: int, key: str, message: str
) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        calibrated_mechanism(make_config(delta=1e-3), num_records)

    assert caught.value.key == key


def test_without_a_budget_gradients_are_clipped_and_get_no_noise(make_config: MakeConfig) -> None:
    config = make_config(epsilon=math.inf, delta=0.5)

    assert calibrated_mechanism(config, 100) == Mechanism(0.0, config.clip_norm, 16, 100)
    assert calibrated_mechanism(config, 9) == Mechanism(0.0, config.clip_norm, 9, 9)


def test_adapters_are_built_as_configured(make_config: MakeConfig) -> None:
    config = make_config(
        rank=3,
        lora_alpha=12.0,
        lora_dropout=0.25,
        lora_targets=r"blocks\.[01]\.mlp\.fc1",
        train_head=False,
    )
    adapted = build_adapted(config, build_task("digits", config))

    assert [layer.name for layer in adapted.layers] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert {layer.A.shape[0] for layer in adapted.layers} == {3}
    assert {layer.scaling for layer in adapted.layers} == {4.0}
    assert {layer.dropout.p for layer in adapted.layers} == {0.25}
    assert adapted.head == []


def test_every_process_starts_from_the_same_adapters(make_config: MakeConfig) -> None:
    first, second, other = (
        LocalTrainer.build(make_config(seed=seed)).adapted for seed in (1, 1, 2)
    )

    assert differing(first.read(), second.read()) == set()
    assert differing(first.read(), other.read()) == {"A"}
    assert first.fingerprint == second.fingerprint == other.fingerprint


def test_a_process_keeps_one_trainer_for_a_configuration(make_config: MakeConfig) -> None:
    config: RunConfig = make_config()

    assert process_trainer(config) is process_trainer(make_config())
    assert process_trainer(config) is not process_trainer(make_config(rank=2))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "meta!", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        resolve_device(name)

    assert (caught.value.key, caught.value.value) == ("device", name)


def test_auto_prefers_a_gpu() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
