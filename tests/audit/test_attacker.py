"""What the attacker reads off an upload is what the client clipped, under any weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlora_flwr.audit.attacker import Attacker
from fedlora_flwr.audit.canaries import (
    GRADIENT,
    SCALED,
    AuditRecords,
    AuditTask,
    Canaries,
    directed,
)
from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.clip_weights import EVEN, ClipWeights
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.tasks.registry import build_task
from tests.audit.attacks import settings

COUNT = 4


@pytest.mark.parametrize("kind", [GRADIENT, SCALED])
@pytest.mark.parametrize("weights", [EVEN, ClipWeights(a=4.0, b=0.5, head=0.05)], ids=str)
def test_an_upload_without_noise_shows_the_canarys_clipped_gradient(
    kind: str, weights: ClipWeights
) -> None:
    config = settings(lr_a=0.5, lr_b=0.25, lr_head=0.125)
    task: Any = AuditTask(build_task(config.task, config))
    trainer = LocalTrainer.build(config, task)
    canaries = Canaries.of(kind, task, trainer.adapted.model)
    if kind == GRADIENT:
        trainer = directed(trainer, "")
    records = AuditRecords(task.client_records(0, 4), COUNT, canaries, [True])
    mechanism = Mechanism(0.0, 0.5, COUNT, COUNT, weights=weights)
    rng = np.random.default_rng(0)
    start = {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in trainer.start.items()
    }
    plan = ComponentPlan.parse("*")
    sent = trainer.train(start, plan, records, mechanism, ("canary",)).arrays
    attacker = Attacker(trainer, [records], 1.0, 0.5, 1.0, weights)

    view = attacker.upload(1, plan, start, sent, COUNT)
    expected = attacker._directions(tuple(trainer.adapted.parameters), start)

    assert sum(float((seen**2).sum()) for seen in view.seen.values()) == pytest.approx(1, rel=1e-3)
    for name, seen in view.seen.items():
        np.testing.assert_allclose(seen, expected[name][0], atol=2e-4)
