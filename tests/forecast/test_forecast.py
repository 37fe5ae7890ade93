from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.cli.run_screen import describe_plan
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import MOST_THAT_GAINED, forecast
from fedlora_flwr.forecast.memory import activation_bytes
from fedlora_flwr.forecast.participation import participation
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism, poisson_batches
from fedlora_flwr.privacy.postprocessing.filters import FILTERS, make_filter
from fedlora_flwr.server.noise import noise_to_signal, noisy_coordinates
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from tests.conftest import MakeConfig


def test_noise_is_that_of_the_plan(make_config: MakeConfig) -> None:
    config = make_config(partitioner="dirichlet", num_clients=5, epsilon=3.0, min_records=20)
    found, plan = forecast(config), prepare_run(config)
    assert [client.mechanism for client in found.clients] == list(plan.mechanisms)
    assert [client.records for client in found.clients] == [m.num_records for m in plan.mechanisms]
    assert found.broken == 0


@pytest.mark.parametrize("strategy", ["dp-lora", "ffa-lora", "rolora", "la-lora", "fedsa-lora"])
def test_bytes_are_those_of_a_run(strategy: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(strategy=strategy, num_rounds=2)
    summary = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), lambda row: None)
    found, rounds = forecast(config), 2 * config.num_clients
    assert summary["bytes_up"] == rounds * found.bytes_up
    if strategy != "fedsa-lora":  # Whose clients hold what they do not download.
        assert summary["bytes_down"] == rounds * found.bytes_down


@pytest.mark.parametrize("weighting", ["uniform", "size", "inverse-noise"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_noise_to_signal_is_the_norm_of_drawn_noise(weighting: str, share: float) -> None:
    config = RunConfig.of(
        {"weighting": weighting, "local-steps": 4, "fraction-train": share, "clip-norm": 2.0}
    )
    sizes, sigma = np.array([50, 100, 150, 300]), np.array([3.0, 2.0, 1.5, 1.0])
    made = [Mechanism(s, 2.0, 16, int(n)) for s, n in zip(sigma, sizes, strict=True)]
    draw = np.random.default_rng(0)
    weights = {"uniform": sizes**0.0, "size": sizes * 1.0, "inverse-noise": sigma**-2.0}[weighting]
    squares = []
    for _ in range(400):
        cohort = draw.permutation(4)[: round(4 * share)]
        # Weights of the expected cohort: a smaller one is as if each client counted for more.
        w = weights[cohort] / weights.sum() * 4 / len(cohort)
        noise = [
            sum(sigma[i] * 2.0 / 16 * draw.standard_normal(100) for _ in range(4)) for i in cohort
        ]
        squares.append(np.square(sum(a * b for a, b in zip(w, noise, strict=True))).sum())
    signal = 4 * 2.0
    expected = math.sqrt(np.mean(squares)) / signal
    assert noise_to_signal(config, made, 100) == pytest.approx(expected, rel=0.06)


def test_without_privacy_there_is_no_noise() -> None:
    config = RunConfig.of({"epsilon": math.inf})
    assert noise_to_signal(config, [Mechanism(0.0, 1.0, 16, 100)], 100) is None


def test_activations_are_what_a_real_forward_pass_keeps(make_config: MakeConfig) -> None:
    config = make_config(batch_size=16)
    trainer = LocalTrainer.build(config)
    batch = trainer.task.test_records().batch(torch.arange(16))
    own = {p.untyped_storage().data_ptr() for p in trainer.adapted.model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.engine._sampler.num_records = 16
    trainer.adapted.model.train()
    for parameter in trainer.adapted.parameters.values():
        parameter.requires_grad_(True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with sdpa_kernel(SDPBackend.MATH), hooks:
        trainer.task.losses(trainer.adapted.model, batch)
    expected = sum(size for pointer, size in kept.items() if pointer not in own)
    found = forecast(config).memory.activations
    assert found is not None
    assert found == pytest.approx(expected, rel=0.01)


def test_memory_by_record_is_that_of_the_largest_step(make_config: MakeConfig) -> None:
    config = make_config(strategy="rolora", batch_size=16)
    trainer = LocalTrainer.build(config)
    names = trainer.layout.active(ComponentPlan.uniform("B"), 1)
    samples = trainer.engine.gradients_by_record(
        trainer.task.test_records(), torch.arange(16), names
    )
    expected = sum(sample.numel() * sample.element_size() for sample in samples.values())
    assert forecast(config).memory.per_record == expected


def test_a_microbatch_needs_less_memory(make_config: MakeConfig) -> None:
    whole = forecast(make_config(batch_size=16)).memory
    part = forecast(make_config(batch_size=16, microbatch_size=4)).memory
    assert part.per_record == whole.per_record / 4
    assert whole.activations is not None
    assert part.activations == pytest.approx(whole.activations / 4, rel=0.01)


def test_a_model_that_looks_at_values_is_measured_by_nothing(make_config: MakeConfig) -> None:
    class Curious:
        def losses(self, model: Any, batch: Any) -> torch.Tensor:
            total: torch.Tensor = batch["image"].sum()
            return total if bool(total > 0) else -total

    trainer = LocalTrainer.build(make_config())
    adapted: AdaptedModel = trainer.adapted
    assert activation_bytes(Curious(), adapted, {"image": torch.ones(2, 2)}) is None  # type: ignore[arg-type]


def test_hopeless_noise_is_a_warning_and_a_good_plan_has_none(make_config: MakeConfig) -> None:
    assert forecast(make_config(num_clients=10, epsilon=8.0, batch_size=32)).warnings == []
    lines = forecast(make_config(epsilon=0.02, batch_size=16)).warnings
    assert len(lines) == 1
    assert re.search(r"noise is \d+\.\d times .* none above 5 ended better than it began", lines[0])


def test_the_largest_noise_that_a_run_gained_under_is_the_measured_one() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    found = json.loads((results / "learning.json").read_text())["gains"]["round_noise"]
    assert found["largest_that_gains"] == pytest.approx(MOST_THAT_GAINED, abs=0.05)
    rows = pd.read_csv(results / "learning.csv")
    assert len(rows) >= 30
    assert not rows[rows["round_noise"] > MOST_THAT_GAINED]["gains"].any()


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("strategy", "steps"), [("la-lora", 5), ("dp-lora", 3)])
def test_a_filter_leaves_a_round_the_noise_that_is_counted(
    name: str, strategy: str, steps: int, make_config: MakeConfig
) -> None:
    config = make_config(strategy=strategy, local_steps=steps, filter=name)
    trainer = LocalTrainer.build(config)
    shapes = {key: tuple(p.shape) for key, p in trainer.adapted.parameters.items()}
    plan = build_strategy(config).plan(1, trainer.layout)
    counted = noisy_coordinates([plan], trainer.layout, shapes, steps, name)
    squares, draw = [], torch.Generator().manual_seed(0)
    for _ in range(20):
        made, total = make_filter(name), {key: torch.zeros(shape) for key, shape in shapes.items()}
        for step in range(1, steps + 1):
            for key in trainer.layout.active(plan, step):
                total[key] += made(key, torch.randn(shapes[key], generator=draw))
        squares.append(sum(float((array**2).sum()) for array in total.values()))
    assert counted * steps == pytest.approx(np.mean(squares), rel=0.03)
    if name == "none":
        assert counted == pytest.approx(
            np.mean(
                [
                    sum(math.prod(shapes[key]) for key in trainer.layout.active(plan, step))
                    for step in range(1, steps + 1)
                ]
            )
        )


def test_a_promise_that_cannot_be_kept_is_a_warning_for_each_client(
    make_config: MakeConfig,
) -> None:
    found = forecast(make_config(delta=0.5))
    assert found.broken == 3
    assert [f"Client {n} cannot keep the promise" in w for n, w in enumerate(found.warnings)]
    assert "below 1/n" in found.warnings[0]
    assert found.noise_to_signal is None
    many = forecast(make_config(num_clients=9, min_records=1, batch_size=500, epsilon=3.0))
    assert many.warnings[-1] == "6 more clients cannot keep it."


def test_a_cap_below_the_mean_number_of_rounds_is_a_warning(make_config: MakeConfig) -> None:
    config = make_config(num_clients=4, num_rounds=10, max_rounds=3, fraction_train=0.5)
    found = forecast(config)
    assert "The run ends after round 6 of 10" in found.warnings[0]
    assert "may join 3 (max-rounds)" in found.warnings[0]
    assert found.as_json()["rounds"] == {
        "cohort": 2, "num_rounds": 10, "first_spent": 5, "last_round": 6, "least": 3, "most": 3,
        "mean": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"max_rounds": 5}, "10 rounds with 2 clients each; every client joins 5"),
        ({"max_rounds": 7}, "10 rounds with 2 clients each; every client joins 5"),
        ({"max_rounds": 3}, "every client joins 3; no client has budget left after round 6"),
        (
            {"max_rounds": 3, "num_rounds": 5},
            "5 rounds with 2 clients each; every client joins 2 or 3",
        ),
        ({}, "10 rounds with 2 clients each; every client joins 5 on average"),
        ({"fraction_train": 1.0}, "10 rounds with 4 clients each; every client joins all 10"),
        ({"fraction_train": 1.0, "num_rounds": 1}, "1 round with 4 clients; every client joins it"),
        (
            {"fraction_train": 0.3, "max_rounds": 2},
            "10 rounds with 1 client each; every client joins 2; no",
        ),
    ],
)
def test_the_plan_says_how_often_each_client_joins(
    changes: dict[str, Any], line: str, make_config: MakeConfig
) -> None:
    config = make_config(**{"num_clients": 4, "num_rounds": 10, "fraction_train": 0.5, **changes})
    assert line in str(participation(config))


def test_records_can_be_given_instead_of_data(make_config: MakeConfig) -> None:
    found = forecast(make_config(task="digits"), records=900)
    assert [client.records for client in found.clients] == [900] * 3


def test_steps_are_counted_by_the_plans_that_train_them(make_config: MakeConfig) -> None:
    trainer = LocalTrainer.build(make_config())
    sizes = {name: p.numel() for name, p in trainer.adapted.parameters.items()}
    b = sum(sizes[n] for n in trainer.layout.active(ComponentPlan.uniform("B"), 1))
    a = sum(sizes[n] for n in trainer.layout.active(ComponentPlan.uniform("A"), 1))
    assert forecast(make_config(strategy="ffa-lora")).coordinates == b
    assert forecast(make_config(strategy="rolora")).coordinates == round((a + b) / 2)
    assert forecast(make_config(strategy="dp-lora")).coordinates == sum(sizes.values())
    assert forecast(make_config(strategy="ffa-lora")).trained == sum(sizes.values())
    run = prepare_run(make_config(strategy="ffa-lora"))
    assert (run.per_step, run.trained) == (b, sum(sizes.values()))
    assert (
        f"{run.trained:,} in LoRA of rank 4 and the head, {b:,} of them in each step"
        in (describe_plan(run)[0][1])
    )


def test_the_seeded_batches_of_a_forecast_are_untouched(make_config: MakeConfig) -> None:
    state = torch.get_rng_state()
    forecast(make_config())
    assert torch.equal(state, torch.get_rng_state())
    assert list(poisson_batches(Mechanism(1.0, 1.0, 4, 50), 1, 3))


def test_the_command_prints_the_forecast_and_fails_for_a_broken_promise() -> None:
    good = CliRunner().invoke(app, ["plan", "digits", "-c", "device=cpu", "-c", "num-clients=3"])
    assert good.exit_code == 0
    lines = good.output.splitlines()
    assert lines[0].split() == ["client", "records", "q", "=", "b/n", "σ", "steps"]
    assert len([line for line in lines if line.split()[0].isdigit()]) == 3
    gradients = ["Gradient"] * 3  # What was measured, and each kind of steps.
    starts = ("Privacy", "Rounds", "Trains", "Noise", *gradients, "Memory", "Bytes", "Time")
    assert [line.split()[0] for line in lines[4:]] == [*starts, "Advice"]
    bad = CliRunner().invoke(app, ["plan", "digits", "--records", "20"])
    assert bad.exit_code == 1
    assert bad.output.count("Warning  ") == 4
    told = "not measured, because a client cannot keep the promise"
    missing = [line.split()[0] for line in bad.output.splitlines() if told in line]
    assert missing == ["Gradient", "Time"]
    assert "leave this client's records out" in bad.output


def test_the_command_writes_json() -> None:
    result = CliRunner().invoke(app, ["plan", "digits", "--json", "--records", "200"])
    found = json.loads(result.output)
    assert len(found["clients"]) == 10
    assert found["clients"][0]["records"] == 200
    assert found["clients"][0]["noise_multiplier"] > 0
    assert found["memory_bytes"]["activations"] > 0


def test_bad_input_is_one_error() -> None:
    result = CliRunner().invoke(app, ["plan", "digits", "-c", "lora-targets=nothing"])
    assert result.exit_code == 1
    assert "lora-targets = 'nothing'" in result.output
    with pytest.raises(InvalidValue, match="num-clients"):
        forecast(RunConfig.of({"num-clients": 5000}))
