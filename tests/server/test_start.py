"""Runs that begin from an adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.server.checkpoint import Checkpoints
from fedlora_flwr.simulations.runner import prepare_run
from tests.server.resuming import begin, bits, rows, tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def first(tmp_path: Path) -> tuple[RunConfig, Path]:
    """Return a run of one round, and where its adapter is."""
    config = tiny(tmp_path, num_rounds=1, seed=1)
    begin(config, tmp_path / "first")
    return config, tmp_path / "first" / "adapter"


def test_a_run_begins_with_the_arrays_of_another(
    first: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, adapter = first
    begin(replace(config, start=str(adapter), seed=2), tmp_path / "second")
    last, start = (rows(tmp_path / name, "rounds") for name in ("first", "second"))
    assert start[0]["loss"] == last[1]["loss"] != last[0]["loss"]
    older = Checkpoints(tmp_path / "second").folder / "round-0000000"
    newer = Checkpoints(tmp_path / "second").folder / "round-0000001"
    newer.unlink()
    assert older.exists()
    before = load_file(adapter / WEIGHTS)
    begun = Checkpoints(tmp_path / "second").last()[0].arrays
    for name, array in begun.items():
        assert bits(before[f"base_model.model.{name}"].numpy()) == bits(array)


def without_a_factor(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(next(name for name in state if "lora_A" in name))
    save_file(state, folder / WEIGHTS)


def of_another_scaling(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))


def of_another_backbone(folder: Path) -> None:
    (folder / "backbone.txt").write_text("another")


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (without_a_factor, {}, "an adapter that has 'blocks.0.fc.lora_A.weight'"),
        (of_another_scaling, {}, "its scaling is 49.5"),
        (of_another_backbone, {}, "an adapter of this run's backbone"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), {}, "a PEFT adapter's folder"),
        (shutil.rmtree, {}, "a PEFT adapter's folder"),
        (lambda _: None, {"rank": 3, "lora_alpha": 12.0}, "has the shape"),
        (
            lambda _: None,
            {"strategy": "fedsa-lora"},
            "no value with a strategy that leaves a factor or the head",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused_before_the_run(
    change: Any, keys: dict[str, Any], message: str, first: tuple[RunConfig, Path]
) -> None:
    config, adapter = first
    change(adapter)
    with pytest.raises(InvalidValue, match=message):
        prepare_run(replace(config, start=str(adapter), **keys))
