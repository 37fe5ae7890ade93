"""Runs that are compared compute the frozen first layers of a record once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.privacy.mechanism import Mechanism
from tests.conftest import MakeConfig

LAST = r"blocks\.3\.attn\.qkv"

pytestmark = pytest.mark.usefixtures("between_runs")


@pytest.fixture
def between_runs() -> Iterator[None]:
    PrefixCache.keep_between_runs(True)
    yield
    PrefixCache.keep_between_runs(False)


def one_round(trainer: LocalTrainer, mode: str = "B") -> Mapping[str, Any]:
    records = trainer.task.client_records(0, 3)
    mechanism = Mechanism(1.0, 1.0, len(records), len(records))
    plan = ComponentPlan.parse(mode)
    return trainer.train(trainer.start, plan, records, mechanism, ("c", 1)).arrays


@pytest.mark.parametrize(("targets", "mode"), [(LAST, "B"), (r".*\.attn\.qkv", "-")])
def test_runs_that_are_compared_compute_the_first_layers_once(
    make_config: MakeConfig, targets: str, mode: str
) -> None:
    settings: dict[str, Any] = {"lora_targets": targets, "local_steps": 2}
    first = LocalTrainer.build(make_config(**settings))
    one_round(first, mode)
    assert first.prefix is not None
    known = len(first.prefix)
    assert known > 40
    other = {**settings, "epsilon": 1.0, "lr_b": 0.1, "strategy": "la-lora"}
    second = LocalTrainer.build(make_config(**other))
    assert second.prefix is not None
    assert len(second.prefix) == known
    found = one_round(second, mode)
    assert len(second.prefix) == known
    expected = one_round(LocalTrainer.build(make_config(**other, prefix_cache=0.0)), mode)
    PrefixCache.keep_between_runs(False)
    third = LocalTrainer.build(make_config(**settings))
    assert third.prefix is not None
    assert len(third.prefix) == 0
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"lora_targets": r"blocks\.2\.attn\.qkv"},
        {"strategy": "head-only", "lora_alpha": 64.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_runs_of_other_models_do_not_share_what_they_compute(
    make_config: MakeConfig, changes: dict[str, Any]
) -> None:
    one_round(LocalTrainer.build(make_config(lora_targets=LAST)))
    given = {"lora_targets": LAST, **changes}
    found = one_round(LocalTrainer.build(make_config(**given)))
    expected = one_round(LocalTrainer.build(make_config(**given, prefix_cache=0.0)))
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_runs_on_another_checkpoint_do_not_share_what_they_compute(make_config: MakeConfig) -> None:
    one_round(LocalTrainer.build(make_config(lora_targets=LAST)))
    made = []
    for size in (0.0, 4.0):
        other = LocalTrainer.build(make_config(lora_targets=LAST, prefix_cache=size))
        with torch.no_grad():
            other.adapted.model.get_base_model().get_submodule("blocks.0.mlp.fc1").weight.mul_(2)
        made.append(one_round(other))
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
