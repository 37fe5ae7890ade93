from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora_flwr.backbones.sentence_encoders import is_read_by_mean
from fedlora_flwr.cli.run_screen import describe_plan
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.simulations.runner import prepare_run
from tests.tasks.texts import text_config, write_reviews


def as_library_writes_it(folder: Path, pooling: dict[str, Any], place: str = "1_Pooling") -> Path:
    """Write what sentence-transformers writes beside a checkpoint."""
    (folder / place).mkdir(parents=True, exist_ok=True)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": place, "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / place / "config.json").write_text(json.dumps(pooling))
    return folder


MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


@pytest.mark.parametrize("place", ["1_Pooling", "pool"])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_tells_how_it_is_read(mode: str, place: str, tmp_path: Path) -> None:
    switches = {f"pooling_mode_{name}": name == mode for name in MODES}
    pooling = {"word_embedding_dimension": 384, **switches}
    assert is_read_by_mean(str(as_library_writes_it(tmp_path, pooling, place))) is (
        mode == "mean_tokens"
    )


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_newer_checkpoints_name_the_mode(mode: str, tmp_path: Path) -> None:
    folder = as_library_writes_it(tmp_path, {"pooling_mode": mode})
    assert is_read_by_mean(str(folder)) is (mode == "mean")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"type": 1}', "[1]", '[{"type": "a.Pooling"}]'])
def test_a_checkpoint_of_another_kind_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert not is_read_by_mean(str(tmp_path))


def test_a_plan_and_a_run_say_that_the_mean_was_meant(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = checkpoint("bert")
    copied = tmp_path / "encoder"
    copied.mkdir()
    for file in model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    as_library_writes_it(copied, {"pooling_mode_mean_tokens": True})
    config = text_config(copied, write_reviews(tmp_path / "set"), batch_size=4, delta=1e-3)
    (warning,) = [text for text in forecast(config).warnings if "pooling" in text]
    assert "Set pooling = 'mean'" in warning
    assert ("Warning", warning) in describe_plan(prepare_run(config))
    mean = text_config(
        copied, tmp_path / "set", batch_size=4, delta=1e-3, pooling="mean", max_length=16
    )
    assert not any("pooling" in text for text in forecast(mean).warnings)
