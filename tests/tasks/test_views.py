"""Views of pictures: what they are, and that a record's mean gradient over them is clipped to C."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.tasks.registry import build_task
from fedlora_flwr.tasks.views import Views, training_losses
from tests.models import VIT, active, loop_gradients, update

K = 3
JOINED = [0, 2, 3]


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (16, 40)])
@pytest.mark.parametrize("mirror", [False, True])
def test_each_view_is_its_own_picture_shifted_and_maybe_mirrored(
    rows: int, columns: int, mirror: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, rows, columns), generator=generator, dtype=torch.uint8)
    batch = {"image": pictures, "label": torch.arange(4)}
    torch.manual_seed(1)
    made = Views(20, mirror)(batch)

    assert made["image"].dtype == torch.uint8
    assert made["label"].tolist() == [label for label in range(4) for _ in range(20)]
    up, left = rows // 8, columns // 8
    seen: set[tuple[int, int, bool]] = set()
    for place, view in enumerate(made["image"].numpy()):
        own = np.pad(pictures[place // 20].numpy(), ((0, 0), (up, up), (left, left)), "reflect")
        found = {
            (down, right, turned)
            for down in range(2 * up + 1)
            for right in range(2 * left + 1)
            for turned in (False, True)
            if np.array_equal(
                view,
                own[:, down : down + rows, right : right + columns][:, :, :: -1 if turned else 1],
            )
        }
        assert len(found) == 1
        seen |= found
    assert {turned for *_, turned in seen} == ({False, True} if mirror else {False})
    assert {down for down, *_ in seen} == set(range(2 * up + 1))


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("mode", ["B", "*"])
def test_a_step_clips_the_mean_over_views_worked_out_by_hand(
    mode: str, microbatch: int | None
) -> None:
    views, clip_norm = Views(K, mirror=True), 0.7
    engine = PrivateEngine(VIT.adapted(), views.over(VIT.losses), microbatch)
    records = VIT.records(6)
    engine.verify(records)
    torch.manual_seed(5)
    moved = update(engine, records, JOINED, mode, Mechanism(0.0, clip_norm, 4, 6))

    # The same draws, and then plain PEFT on one view at a time.
    torch.manual_seed(5)
    made = views(records.batch(torch.tensor(JOINED)))
    names = active(engine.adapted, mode)
    each = loop_gradients(VIT, VIT.plain(), type(records)(made), range(K * len(JOINED)))
    total = {name: torch.zeros_like(each[name][0]) for name in names}
    for record in range(len(JOINED)):
        mean = {name: each[name][K * record : K * (record + 1)].mean(0) for name in names}
        norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
        assert norm > clip_norm
        for name, gradient in mean.items():
            total[name] += gradient * clip_norm / norm
    for name, expected in total.items():
        torch.testing.assert_close(moved[name], expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def trainer() -> LocalTrainer:
    return LocalTrainer.build(
        RunConfig(
            task="digits", device="cpu", reproducible=True, local_steps=2, augmentation="shift",
            views=K,
        )
    )  # fmt: skip


def trained(trainer: LocalTrainer, mechanism: Mechanism, stream: int) -> dict[str, Tensor]:
    records = trainer.task.client_records(0, 10)
    plan = ComponentPlan.parse("*")
    stated = replace(mechanism, num_records=len(records))
    made = trainer.train(trainer.start, plan, records, stated, (stream,), untrusted=True)
    return {name: torch.from_numpy(np.array(array)) for name, array in made.arrays.items()}


def test_views_follow_the_seed_of_client_and_round(trainer: LocalTrainer) -> None:
    quiet = Mechanism(0.0, 1.0, 32, 100)
    one, again, other = (trained(trainer, quiet, stream) for stream in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    # Another seed of the process changes nothing.
    torch.manual_seed(99)
    assert all(torch.equal(one[n], tensor) for n, tensor in trained(trainer, quiet, 1).items())


def test_noise_and_batches_are_drawn_as_without_views(
    trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is empty leaves the noise alone, and batches are the same as well."""
    plain = LocalTrainer.build(replace(trainer.config, augmentation="none", views=1))
    almost_none = Mechanism(1.0, 1.0, 1e-9, 100)
    one, other = trained(trainer, almost_none, 1), trained(plain, almost_none, 1)
    assert all(torch.equal(one[name], other[name]) for name in one)
    joined: list[list[int]] = []
    step = PrivateEngine.step

    def watched(self: PrivateEngine, records: object, indices: Tensor, *others: Any) -> None:
        joined.append(indices.tolist())
        step(self, records, indices, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(PrivateEngine, "step", watched)
    for made in (trainer, plain):
        trained(made, Mechanism(1.0, 1.0, 32, 100), 1)
    assert joined[:2] == joined[2:]


def test_without_augmentation_the_loss_is_the_tasks_own() -> None:
    config = RunConfig(task="digits")
    task = build_task("digits", config)
    assert training_losses(config, task) == task.losses


def test_a_task_without_a_loss_for_each_view_is_refused_by_name() -> None:
    engine = PrivateEngine(VIT.adapted(), Views(K).over(lambda model, batch: torch.zeros(())))
    with pytest.raises(PrivacyViolation, match=r"shape \(\) for 18 views"):
        engine.gradients_by_record(VIT.records(6), torch.arange(6), [])


def test_a_forecast_counts_the_memory_of_every_view() -> None:
    kept = [
        forecast(RunConfig(task="digits", augmentation=how, views=views), 100).memory
        for how, views in (("none", 1), ("shift", 4))
    ]
    assert kept[0].activations is not None
    assert kept[1].activations is not None
    assert kept[1].activations == pytest.approx(4 * kept[0].activations, rel=0.05)
    assert kept[1].per_record == kept[0].per_record


def test_views_of_nothing_and_of_texts_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"views = 4 .*all views would be the same"):
        RunConfig(views=4)
    config = RunConfig(task="text-classification", model="x", dataset="y", augmentation="shift")
    task = build_task(config.task, config)
    with pytest.raises(InvalidValue, match=r"augmentation = 'shift' .*are not pictures"):
        training_losses(config, task)
