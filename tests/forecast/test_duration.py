from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.forecast.duration import Duration, in_words, measure
from fedlora_flwr.forecast.forecast import forecast
from fedlora_flwr.server import rehearsal
from fedlora_flwr.simulations.runner import prepare_run
from fedlora_flwr.tasks.registry import build_task
from tests.backbones import checkpoints
from tests.conftest import MakeConfig
from tests.tasks.texts import ALL, text_config, write_reviews


def test_a_duration_is_what_was_measured_times_what_is_counted() -> None:
    found = Duration(steps=1200, step=0.5, evaluations=5, evaluation=24.0)
    assert found.total == 720.0
    assert "about 12 min by estimate" in str(found)
    assert "1,200 private steps of 0.5 s and 5 evaluations of 24 s" in str(found)
    assert "evaluation" not in str(Duration(steps=3, step=0.5))
    assert "3 private steps of 1,234 s" in str(Duration(steps=3, step=1234.4))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"), (89, "89 s"), (91, "2 min"), (7000, "117 min"), (12_000, "3 h 20 min"),
        (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_a_time_is_written_in_units_that_a_reader_counts_in(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("changes", "steps", "evaluations"),
    [
        ({}, 3 * 2 * 2, 3),
        ({"num_rounds": 5, "eval_every": 2}, 3 * 5 * 2, 4),
        ({"strategy": "fedsa-lora"}, 3 * 2 * 2, 1 + 3 * 2),
        ({"num_rounds": 10, "max_rounds": 3, "num_clients": 4, "fraction_train": 0.5}, 24, 7),
    ],
)
def test_steps_and_evaluations_are_those_of_the_run(
    changes: dict[str, float], steps: int, evaluations: int, make_config: MakeConfig
) -> None:
    config, state = make_config(**changes), torch.get_rng_state()
    found = measure(config, build_task(config.task, config))
    assert (found.steps, found.evaluations, found.problem) == (steps, evaluations, "")
    assert found.step > 0
    assert found.evaluation is not None
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_measured_says_why_and_how_to_find_out(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setattr(rehearsal, "_LARGEST", 1)
    found = measure(config, build_task(config.task, config))
    assert found.total is None
    assert str(found).startswith("not measured: a plan builds no model above 200 million weights.")
    assert "-c num-rounds=1" in str(found)


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Texts and a model of which no weights are there."""
    folder = tmp_path_factory.mktemp("reviewed")
    model = checkpoints.bert(folder / "model", ALL)
    (model / "model.safetensors").unlink()
    return text_config(model, write_reviews(folder / "set"), batch_size=4, delta=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("test-split", "tset", "test-split = 'tset'"),
        ("train-split", "trian", "train-split = 'trian'"),
        ("label-column", "lable", "label-column = 'lable'"),
        ("input-columns", "txt", "input-columns = 'txt'"),
        ("class-names", "0", "class-names = '0'"),
    ],
)
def test_a_plan_and_the_start_of_a_run_open_both_splits_before_any_weight_is_read(
    key: str, value: str, told: str, reviewed: RunConfig
) -> None:
    config = RunConfig.of(reviewed.items(), {key: value})
    for prepare in (forecast, prepare_run):
        with pytest.raises(InvalidValue, match=told):
            prepare(config)


def test_a_class_that_the_test_split_alone_has_is_found_by_a_plan(
    reviewed: RunConfig, tmp_path: Path
) -> None:
    folder = write_reviews(tmp_path / "set")
    checkpoints.write_split(folder, "validation", [{"text": "fine", "label": 7}])
    config = RunConfig.of(reviewed.items(), {"dataset": str(folder)})
    for prepare in (forecast, prepare_run):
        with pytest.raises(InvalidValue, match=r"num-classes = 2 .* at least 8, as a record"):
            prepare(config)


def test_a_plan_shows_what_it_read_and_the_time_without_any_weight(
    reviewed: RunConfig, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(reviewed.to_toml())
    found = CliRunner().invoke(app, ["plan", str(recipe)])
    assert found.exit_code == 0, found.output
    assert "Records   train: 60 of 60 records, read from 'text'" in found.output
    assert "Records   validation: 20 of 20 records" in found.output
    assert "Time      about " in found.output
