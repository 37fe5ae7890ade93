"""What joint clipping leaves of each part, against autograd, drawn noise and a real run's plan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import Batch, Records, TensorRecords
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.forecast import Forecast, forecast
from fedlora_flwr.forecast.gradients import (
    Gradients,
    Group,
    clipped_norms,
    measure,
    squared_norms,
)
from fedlora_flwr.layout import Layout, part_of
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.server.strategy import build_strategy
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.registry import Task, build_task
from tests.conftest import MakeConfig


def measured(config: RunConfig, task: Task | None = None, *, opened: bool = True) -> Gradients:
    task = task or build_task(config.task, config)
    found = measure(config, task, forecast(config), opened=opened)
    assert not found.problem
    return found


def group(found: Gradients, mode: str, part: str) -> Group:
    (chosen,) = (one for one in found.modes if one.name == mode)
    return next(one for one in chosen.groups if one.part == part)


def test_norms_are_those_of_autograd_on_one_record_at_a_time(make_config: MakeConfig) -> None:
    config = make_config()
    task = build_task(config.task, config)
    adapted = build_adapted(config, task)
    records = TensorRecords(task.test_records().batch(torch.arange(6)))
    found = squared_norms(task, adapted, records)
    adapted = build_adapted(config, task)
    for record in range(6):
        parameters = adapted.parameters
        loss = task.losses(adapted.model, records.batch(torch.tensor([record]))).sum()
        alone = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            expected = float(gradient.double().square().sum())
            assert float(found[name][record]) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("weights", [EVEN, ClipWeights(a=2.0, b=0.5, head=0.1)])
@pytest.mark.parametrize("clip_norm", [0.1, 3.0, 100.0])
def test_a_share_is_what_is_left_after_each_record_is_clipped(
    clip_norm: float, weights: ClipWeights
) -> None:
    draw = np.random.default_rng(0)
    names = ["x.lora_A.weight", "x.lora_B.weight", "head.weight"]
    rows = {
        name: draw.standard_normal((5, size)) for name, size in zip(names, (2, 3, 4), strict=True)
    }
    squares = {name: torch.tensor((row**2).sum(axis=1)) for name, row in rows.items()}
    active = names[1:]
    joint, parts = clipped_norms(squares, active, clip_norm, weights)
    rows = {name: weights.of(name) * row for name, row in rows.items()}
    kept: dict[str, list[float]] = {"B": [], "head": []}
    for record in range(5):
        whole = np.concatenate([rows[name][record] for name in active])
        factor = min(1.0, clip_norm / np.linalg.norm(whole))
        for name in active:
            kept[part_of(name)].append(
                float(np.linalg.norm(factor * rows[name][record])) / clip_norm
            )
    assert set(parts) == set(kept)
    for part, shares in kept.items():
        assert parts[part][1] == pytest.approx(np.mean(shares))
    norms = [np.linalg.norm(np.concatenate([rows[n][i] for n in active])) for i in range(5)]
    assert joint == pytest.approx(np.mean(norms))
    assert clipped_norms(squares, active, math.inf)[1]["B"][1] is None


def test_weights_in_the_clip_change_what_is_left(make_config: MakeConfig) -> None:
    even, light = (
        measured(make_config(strategy="ffa-lora", **changes))
        for changes in ({}, {"clip_weight_head": 0.01})
    )
    parts = [
        (group(found, "B + head", "B"), group(found, "B + head", "head")) for found in (even, light)
    ]
    assert [one.norm for one in parts[0]] == [one.norm for one in parts[1]]
    assert (parts[1][0].share or 0) > 1.5 * (parts[0][0].share or 1)
    assert (parts[1][1].share or 1) < 0.1 * (parts[0][1].share or 0)


def test_a_start_from_the_weights_is_where_gradients_are_measured(make_config: MakeConfig) -> None:
    config = make_config(strategy="dp-lora")
    fresh, started = (measured(replace(config, lora_init=how)) for how in ("random", "pissa"))
    # B is 0 at a random start, so A has no gradient there.
    assert group(fresh, "A + B + head", "A").norm == 0
    assert group(started, "A + B + head", "A").norm > 0


def test_the_noise_of_a_part_is_that_of_drawn_noise_over_its_clipped_gradients(
    make_config: MakeConfig,
) -> None:
    """Draws a round of LA-LoRA, whose factors take turns by local step."""
    config = make_config(strategy="la-lora", local_steps=4, epsilon=2.0)
    found, noisy = forecast(config), {"B": 0.0, "head": 0.0}
    task = build_task(config.task, config)
    adapted, strategy = build_adapted(config, task), build_strategy(config)
    layout = Layout.of(adapted.parameters)
    mechanisms = [client.mechanism for client in found.clients]
    draw, rounds = np.random.default_rng(0), 60
    plan = strategy.plan(1, layout)
    for _ in range(rounds):
        for name, parameter in adapted.parameters.items():
            mean = np.zeros(parameter.numel())
            for step in range(1, 5):
                for made in mechanisms if name in layout.active(plan, step) else []:
                    assert made is not None
                    scale = math.sqrt(made.noise_variance) / len(mechanisms)
                    mean += scale * draw.standard_normal(mean.size)
            if (part := part_of(name)) in noisy:
                noisy[part] += float((mean**2).sum()) / rounds
    whole = measured(config)
    shares = {
        part: sum(
            group(whole, mode, part).share or 0.0
            for mode, steps in {"B + head": 2, "A + head": 2}.items()
            if part in mode
            for _ in range(steps)
        )
        for part in noisy
    }
    for part, square in noisy.items():
        ratio = math.sqrt(square) / (config.clip_norm * shares[part])
        assert group(whole, "B + head", part).noise_to_signal == pytest.approx(ratio, rel=0.05)
    assert group(whole, "A + head", "A").noise_to_signal is None  # B is 0, so A has no gradient.


def test_the_advised_alpha_makes_both_parts_equally_long(make_config: MakeConfig) -> None:
    found = measured(make_config(strategy="ffa-lora", lora_alpha=0.25))
    assert group(found, "B + head", "B").share < 0.1  # type: ignore[operator]
    (warning,) = found.warnings
    assert "B gets" in warning
    assert "strategy = 'head-only'" in warning
    weight, alpha = (float(part.split()[0]) for part in warning.split("(about ")[1:])
    weighted = measured(make_config(strategy="ffa-lora", lora_alpha=0.25, clip_weight_head=weight))
    shares = [group(weighted, "B + head", part).share for part in ("B", "head")]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)
    assert weighted.warnings == []
    again = measured(make_config(strategy="ffa-lora", lora_alpha=alpha))
    b, head = (group(again, "B + head", part).norm for part in ("B", "head"))
    assert b == pytest.approx(head, rel=0.05)
    assert again.warnings == []
    at_more = measured(make_config(strategy="ffa-lora", lora_alpha=100 * alpha))
    assert ["head gets" in line and "Lower lora-alpha" in line for line in at_more.warnings] == [
        True
    ]


def test_a_clip_norm_above_all_gradients_is_to_be_lowered(make_config: MakeConfig) -> None:
    found = measured(make_config(strategy="ffa-lora", clip_norm=1000.0))
    joint = found.modes[0].joint
    assert len(found.warnings) == 2
    assert all(f"lower it towards {joint:.2g}." in line for line in found.warnings)
    alone = measured(make_config(strategy="head-only"))
    assert [mode.name for mode in alone.modes] == ["head"]
    assert alone.warnings == []


def test_without_clipping_or_noise_there_are_norms_alone(make_config: MakeConfig) -> None:
    found = measured(make_config(epsilon=math.inf, clip_norm=math.inf))
    assert {one.share for mode in found.modes for one in mode.groups} == {None}
    assert {one.noise_to_signal for mode in found.modes for one in mode.groups} == {None}
    assert found.warnings == []
    clipped = measured(make_config(epsilon=math.inf))
    assert group(clipped, "B + head", "head").share is not None


class Closed:
    """Records that may be counted and never read."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, indices: torch.Tensor) -> Batch:
        raise AssertionError(f"{len(indices)} private records were read")


class Guarded(DigitsTask):
    """Digits whose private records cannot be read."""

    def client_records(self, partition_id: int, num_partitions: int) -> Records:
        return Closed(super().client_records(partition_id, num_partitions))


class Shared(Guarded):
    """Its public records may be private."""

    def check_splits_apart(self) -> None:
        raise InvalidValue("test-split", "train", "a split that shares no record")


class Unchecked(Guarded):
    """A task of a user's own, which cannot tell whether its splits are apart."""

    check_splits_apart = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "opened", "inputs"),
    [
        (Guarded, True, "public records"),
        (Guarded, False, "random inputs"),
        (Shared, True, "random inputs"),
        (Unchecked, True, "random inputs"),
    ],
)
def test_no_private_record_is_read_and_public_ones_only_if_they_are_apart(
    kind: type[DigitsTask], opened: bool, inputs: str, make_config: MakeConfig
) -> None:
    config = make_config()
    found = measured(config, kind(config), opened=opened)
    assert found.inputs == inputs
    if inputs == "random inputs":  # The same for each set of public records of that form.
        other = kind(config)
        zeros = {
            k: torch.zeros_like(v) for k, v in other.test_records().batch(torch.arange(9)).items()
        }
        other.test_records = lambda: TensorRecords(zeros)  # type: ignore[method-assign]
        assert measured(config, other, opened=opened) == found


def test_random_weights_are_said_and_give_no_warning(make_config: MakeConfig) -> None:
    config = make_config(
        task="image-classification", model="test_vit", dataset="none", num_classes=3,
        image_size=32, clip_norm=1000.0,
    )  # fmt: skip
    task = build_task(config.task, config)
    found = measure(config, task, forecast(config, 200, task), opened=False)
    assert found.weights == "random weights, as its own are not on this machine"
    assert found.inputs == "random inputs"
    assert found.modes
    assert found.warnings == []
    given = replace(config, weights="random")
    own = measure(given, build_task(given.task, given), forecast(given, 200), opened=False)
    assert own.weights == "the model's own weights"
    assert own.warnings


def test_what_is_not_measured_says_why(make_config: MakeConfig) -> None:
    class Broken(DigitsTask):
        def losses(self, model: Any, batch: Batch) -> torch.Tensor:
            raise ValueError("no loss today")

    config = make_config()
    found: Forecast = forecast(config)
    problem = measure(config, Broken(config), found, opened=True).problem
    assert "no loss today" in problem
    assert [*Gradients(problem=problem).lines()] == [f"not measured: {problem}"]


def test_the_command_shows_each_part_and_its_warning() -> None:
    arguments = ["plan", "digits", "-c", "num-clients=3", "-c", "lora-alpha=0.25"]
    shown = CliRunner().invoke(app, arguments).output
    lines = [line for line in shown.splitlines() if line.startswith("Gradient")]
    assert "on 64 public records with the model's own weights" in lines[0]
    assert [line.split("steps of ")[1].split(":")[0] for line in lines[1:]] == [
        "B + head",
        "A + head",
    ]
    assert "Warning   B gets" in shown
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    (first, second) = found["gradients"]["modes"]
    assert [one["part"] for one in first["groups"]] == ["B", "head"]
    assert second["groups"][0] == {"part": "A", "norm": 0.0, "share": 0.0, "noise_to_signal": None}
    assert found["gradients"]["warnings"] == found["warnings"]
