"""How often a run builds its backbone, and that a model built earlier changes no array."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora_flwr.clients.trainer import process_trainer
from fedlora_flwr.server import rehearsal
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import PreparedRun, prepare_run, run_in_process
from fedlora_flwr.tasks.digits import DigitsTask
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.conftest import MakeConfig
from tests.tasks.texts import make_checkpoint, text_config, write_reviews


class Builds:
    """Counts the backbones that are built with their weights."""

    def __init__(self, kind: Any, patch: pytest.MonkeyPatch) -> None:
        self.count, build = 0, kind.build_model

        def counted(task: Any) -> Any:
            self.count += 1
            return build(task)

        patch.setattr(kind, "build_model", counted)


@pytest.fixture(autouse=True)
def no_trainer() -> None:
    """Let no other test's trainer be this process's."""
    process_trainer.cache_clear()


def run(prepared: PreparedRun, folder: Path) -> dict[str, Any]:
    summary = run_in_process(prepared, RunDirectory(folder), lambda _: None)
    assert summary["status"] == "completed"
    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def test_a_run_in_one_process_builds_one_model_for_its_server_and_one_for_its_clients(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = Builds(DigitsTask, monkeypatch)
    prepared = prepare_run(make_config())
    assert builds.count == 1
    first = run(prepared, tmp_path / "first")
    assert builds.count == 2
    # The first run has changed both, and the second one builds its own.
    second = run(prepared, tmp_path / "second")
    assert builds.count == 4
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_large_model_is_not_built_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = text_config(
        make_checkpoint("bert", tmp_path / "model"), write_reviews(tmp_path / "reviews"),
        num_clients=2, num_rounds=1, local_steps=1, batch_size=8, epsilon=8.0, delta=1e-2,
        reproducible=True,
    )  # fmt: skip
    builds = Builds(TextClassification, monkeypatch)
    small = prepare_run(config)
    assert builds.count == 1
    monkeypatch.setattr(rehearsal, "_LARGEST", 1)
    large = prepare_run(config)
    assert builds.count == 1
    assert small.model is not None
    assert replace(large, model=None) == replace(small, model=None)
    one, other = run(small, tmp_path / "small"), run(large, tmp_path / "large")
    assert all(np.array_equal(one[name], other[name]) for name in one)
