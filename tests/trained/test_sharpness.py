"""`sharpness`: an adapter's curvature on real models, against sums that are written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedlora_flwr import evaluate, merge, sharpness
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.trained.opened import opened
from tests.backbones import checkpoints
from tests.cli.documented import fields
from tests.tasks import conversations
from tests.tasks.texts import make_checkpoint, text_config, write_reviews
from tests.trained.folders import exported

FEW: dict[str, Any] = {"records": 20, "probes": 2, "draws": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("digits") / "adapter"
    _, adapted = exported(RunConfig(device="cpu"), folder)
    with torch.no_grad():  # Of the size that training gives them.
        for name, parameter in adapted.parameters.items():
            parameter.mul_(0.3 if "lora" in name else 0.1)
    adapted.export(folder)
    return folder, adapted


def test_the_head_has_the_hessian_of_a_softmax_on_its_inputs(digits: tuple[Path, Any]) -> None:
    """Mean over the records of (diag p - p pᵀ) ⊗ f fᵀ, with the features f and a 1 for the bias."""
    folder, _ = digits
    found = sharpness(folder, parts=["head"], records=30, probes=200, draws=1)
    with opened(folder, None, None, {}) as adapter:
        records = adapter.task.test_records()
        images = records.batch(torch.linspace(0, 359, 30).long())["image"]
        features: list[torch.Tensor] = []
        head = adapter.model.base_model.model.head
        handle = head.register_forward_hook(lambda _, given, __: features.append(given[0]))
        with torch.no_grad():
            chances = adapter.model(images).softmax(dim=1).double().numpy()
        handle.remove()
    inputs = np.hstack([features[0].double().numpy(), np.ones((30, 1))])
    whole = np.mean(
        [np.kron(np.diag(p) - np.outer(p, p), np.outer(f, f))
         for p, f in zip(chances, inputs, strict=True)], axis=0,
    )  # fmt: skip
    assert found.coordinates == 490 == len(whole)
    assert found.largest_eigenvalue == pytest.approx(np.linalg.eigvalsh(whole)[-1], rel=2e-3)
    assert found.trace == pytest.approx(np.trace(whole), abs=4 * found.trace_error)


def test_the_curvature_of_the_weights_does_not_depend_on_how_factors_share_a_scale(
    digits: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, adapted = digits
    with torch.no_grad():
        for layer in adapted.layers:
            layer.A.mul_(4.0)
            layer.B.div_(4.0)
    adapted.export(tmp_path / "adapter")
    (tmp_path / "adapter" / "fedlora.toml").write_bytes((folder / "fedlora.toml").read_bytes())
    with torch.no_grad():
        for layer in adapted.layers:
            layer.A.div_(4.0)
            layer.B.mul_(4.0)

    def top(where: Path, part: str) -> float:
        return sharpness(where, parts=[part], **FEW).largest_eigenvalue

    scaled = tmp_path / "adapter"
    assert top(scaled, "W") == pytest.approx(top(folder, "W"), rel=5e-3)
    # B's coordinates are a quarter as long, so its curvature is 16 times as large.
    assert top(scaled, "B") == pytest.approx(16 * top(folder, "B"), rel=5e-3)


def test_small_moves_follow_the_slope_and_all_is_put_back(digits: tuple[Path, Any]) -> None:
    folder, _ = digits
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = sharpness(folder, radius=1e-2, records=400, probes=2, draws=3)
    assert found.metrics == evaluate(folder).metrics
    assert (found.parts, found.records) == (("A", "B"), 360)
    random, ascent = found.moved
    assert (random.direction, random.draws) == ("random", 3)
    assert random.errors.keys() == found.metrics.keys()
    assert (ascent.direction, ascent.draws, ascent.errors) == ("ascent", 1, {})
    rise = ascent.metrics["loss"] - found.metrics["loss"]
    assert rise == pytest.approx(found.radius * found.gradient_norm, rel=0.02)
    assert abs(random.metrics["loss"] - found.metrics["loss"]) < rise / 4
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_texts_of_other_lengths_and_a_cut_of_them(tmp_path: Path) -> None:
    base, data = make_checkpoint("bert", tmp_path / "base"), write_reviews(tmp_path / "films")
    config = text_config(base, data, input_columns="text", class_names="bad,good")
    exported(config, tmp_path / "adapter")
    given: dict[str, Any] = {"model": base, "eval_batch_size": 7}
    file = next((tmp_path / "films").glob("validation.*"))
    found = sharpness(tmp_path / "adapter", file, **FEW, **given)
    again = sharpness(tmp_path / "adapter", file, **FEW, model=base)
    assert found.records == 20
    assert found.largest_eigenvalue == pytest.approx(again.largest_eigenvalue, rel=1e-3)
    assert found.largest_eigenvalue > 0


def test_the_command_prints_sentences_and_json(digits: tuple[Path, Any]) -> None:
    arguments = [str(digits[0]), "--records", "12", "--probes", "2", "--draws", "1"]
    done = CliRunner().invoke(app, ["sharpness", *arguments, "--parts", "B,head", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert set(said) == fields("sharpness")
    assert said["parts"] == ["B", "head"]
    done = CliRunner().invoke(app, ["sharpness", *arguments])
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names == [
        "Adapter", "Records", "Parts", "Loss", "Largest eigenvalue", "Trace",
        "At random, 0.05", "Up the gradient, 0.05",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": ["A", "C"]}, r"parts = 'A,C' cannot be used: expected some of A, B, head, W"),
        ({"parts": ["A", "A"]}, r"parts = 'A,A' cannot be used: expected some of A, B, head, W"),
        ({"parts": []}, r"parts = '' cannot be used"),
        ({"radius": 0.0}, r"radius = 0.0 cannot be used: expected a number above 0"),
        ({"radius": float("inf")}, r"radius = inf cannot be used"),
        ({"probes": 1}, r"probes = 1 cannot be used: expected an integer of at least 2"),
        ({"draws": 0}, r"draws = 0 cannot be used"),
        ({"records": 0}, r"records = 0 cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused(
    digits: tuple[Path, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue, match=said):
        sharpness(digits[0], **options)


def test_a_merged_model_is_refused(tmp_path: Path) -> None:
    base = checkpoints.llama(tmp_path / "base", conversations.TEXTS)
    rows = [{"prompt": "bali balu", "response": "yes it is"}] * 6
    for name in ("train", "validation"):
        checkpoints.write_split(tmp_path / "chats", name, rows)
    config = text_config(
        base, tmp_path / "chats", task="instruction-tuning", max_length=48,
        lora_targets=conversations.LAYERS["llama"],
    )  # fmt: skip
    exported(config, tmp_path / "adapter")
    data = next((tmp_path / "chats").glob("validation.*"))
    found = sharpness(tmp_path / "adapter", data, model=base, **FEW)
    assert found.largest_eigenvalue > 0
    merge(tmp_path / "adapter", tmp_path / "merged", model=base)
    with pytest.raises(InvalidValue, match="a merged model has no factors"):
        sharpness(tmp_path / "merged", data, **FEW)
