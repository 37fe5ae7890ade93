"""Runs for users from files of texts and of pictures, against loops over users with autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from torch import Tensor

from fedlora_flwr import RunConfig, evaluate, simulate
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.lora.started import read_adapter
from fedlora_flwr.privacy.spent import spent
from fedlora_flwr.tasks.registry import build_task
from tests.data.pictures import image_config, picture
from tests.models import active
from tests.tasks.texts import make_checkpoint, reviews, text_config

USERS = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5]
C, RATE = 0.002, 20.0
Make = Callable[[Path, int], RunConfig]


def of_texts(folder: Path, replaced: int = -1) -> RunConfig:
    """Write texts with users, and return their run; one user may have other records."""
    rows, others = reviews(len(USERS), seed=2), reviews(len(USERS), seed=9)
    chosen = [others[n] if user == replaced else rows[n] for n, user in enumerate(USERS)]
    named = [{**row, "user": f"u{user}"} for row, user in zip(chosen, USERS, strict=True)]
    datasets.Dataset.from_list(named).to_json(folder / "train.jsonl")
    datasets.Dataset.from_list(reviews(12, seed=1)).to_json(folder / "validation.jsonl")
    model = make_checkpoint("bert", folder / "model")
    return text_config(
        model, folder, input_columns="text", num_classes=2, lora_targets=r".*\.(query|value)"
    )


def of_pictures(folder: Path, replaced: int = -1) -> RunConfig:
    """Do the same with pictures in a table."""
    first = [100 + 3 * n if user == replaced else n for n, user in enumerate(USERS)]
    train = {
        "image": [picture(number) for number in first],
        "label": [number % 3 for number in first],
        "user": USERS,
    }
    test = {"image": [picture(300 + n) for n in range(6)], "label": [n % 3 for n in range(6)]}
    for split, columns in (("train", train), ("valid", test)):
        made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        made.to_parquet(str(folder / f"{split}.parquet"))
    return image_config(folder, num_classes=3, rank=2)


BOTH = pytest.mark.parametrize("make", [of_texts, of_pictures], ids=["texts", "pictures"])


def for_users(config: RunConfig, folder: Path, **changes: Any) -> RunConfig:
    """Return a run of one client whose only step takes every user and adds no noise."""
    return replace(
        config, unit="user", user_column="user", num_clients=1, num_rounds=1, local_steps=1,
        batch_size=len(set(USERS)), strategy="ffa-lora", clip_norm=C, epsilon=float("inf"),
        lr_a=RATE, lr_b=RATE, lr_head=RATE, robust="none", run_dir=str(folder / "run"),
        prefix_cache=0.0, **changes,
    )  # fmt: skip


def means_of_users(config: RunConfig) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the start, and each user's mean gradient, from one backward pass per record."""
    task = build_task(config.task, config)
    adapted = build_adapted(config, task)
    adapted.model.eval()
    parameters = {name: adapted.parameters[name] for name in active(adapted, "B")}
    records, found = task.client_records(0, 1), []
    for user in range(len(set(USERS))):
        own = [n for n, other in enumerate(USERS) if other == user]
        total: dict[str, Tensor] = {}
        for record in own:
            loss = task.losses(adapted.model, records.batch(torch.tensor([record]))).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] = total.get(name, torch.zeros_like(gradient)) + gradient / len(own)
        found.append(total)
    return {name: value.detach().clone() for name, value in parameters.items()}, found


def norm(arrays: Mapping[str, Tensor]) -> float:
    return float(sum(array.double().square().sum() for array in arrays.values()) ** 0.5)


def clipped(mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: array * min(1.0, C / norm(mean)) for name, array in mean.items()}


def summed_by_a_run(config: RunConfig, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the clipped gradients that moved a real run's adapter."""
    result = simulate(config, progress=False)
    assert result.summary["status"] == "completed"
    fresh = build_adapted(config, build_task(config.task, config))
    ended = read_adapter(result.adapter, fresh)
    return {
        name: (start - torch.from_numpy(ended[name])) * len(set(USERS)) / RATE
        for name, start in names.items()
    }


@BOTH
def test_a_run_moves_by_the_sum_of_the_clipped_means_of_its_users(
    make: Make, tmp_path: Path
) -> None:
    config = for_users(make(tmp_path, -1), tmp_path)
    start, means = means_of_users(config)

    total = summed_by_a_run(config, start)

    assert min(map(norm, means)) > C  # Every user is cut, so every one moves the sum by C.
    for name, found in total.items():
        expected = sum((clipped(mean)[name] for mean in means), torch.zeros_like(found))
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7)


@BOTH
def test_all_records_of_a_user_together_move_a_run_by_at_most_c(make: Make, tmp_path: Path) -> None:
    """User 3 has most records. In another run all of them are others."""
    sums = []
    for name, replaced in (("own", -1), ("others", 3)):
        folder = tmp_path / name
        folder.mkdir()
        config = for_users(make(folder, replaced), folder)
        start, means = means_of_users(config)
        total = summed_by_a_run(config, start)
        rest = means[:3] + means[4:]
        without = {key: sum(clipped(mean)[key] for mean in rest) for key in total}
        influence = norm({key: total[key] - without[key] for key in total})
        assert influence <= C * (1 + 1e-3)
        assert influence == pytest.approx(C, rel=1e-3)  # Attained, so the bound says something.
        sums.append(total)

    apart = norm({key: sums[0][key] - sums[1][key] for key in sums[0]})
    assert C / 100 < apart <= 2 * C * (1 + 1e-3)


@BOTH
def test_the_ledger_of_a_run_holds_what_an_independent_accountant_confirms(
    make: Make, tmp_path: Path
) -> None:
    config = for_users(make(tmp_path, -1), tmp_path)
    private = replace(
        config, epsilon=3.0, delta=1e-2, num_rounds=2, local_steps=2, batch_size=2,
        reproducible=False,
    )  # fmt: skip

    result = simulate(private, progress=False)

    (row,) = spent(result.path / "ledger.sqlite", delta=1e-2)
    assert (row.unit, row.steps, row.sample_rate) == ("user", 4, 2 / len(set(USERS)))
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    step = dp_event.GaussianDpEvent(row.noise_multiplier)
    accountant.compose(dp_event.PoissonSampledDpEvent(row.sample_rate, step), row.steps)
    assert accountant.get_epsilon(1e-2) == pytest.approx(3.0, rel=0.02)
    assert result.summary["epsilon_max"] <= 3.0
    assert evaluate(result).records == len(build_task(config.task, config).test_records())
