from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.layout import folded_names
from fedlora_flwr.lora.build import build_adapted
from fedlora_flwr.tasks.registry import build_task
from tests.backbones import checkpoints
from tests.data import loading
from tests.data.pictures import image_config, write_pictures
from tests.tasks import conversations, questions
from tests.tasks.texts import fill, text_config, write_reviews

DENSE = r".*\.(query|dense)"


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    kind: str = "SequenceClassification"
    changes: dict[str, Any] = field(default_factory=dict)
    folds: bool = False


def both(
    name: str, family: str, kind: str = "SequenceClassification", **changes: Any
) -> list[Case]:
    """Return a case with the head trained, and one with it frozen."""
    return [
        Case(
            f"{name}-{'trained' if train else 'frozen'}",
            family,
            kind,
            {"train_head": train, **changes},
        )
        for train in (True, False)
    ]


CASES = [
    *both("pooler", "bert"),
    *both("two-layers", "roberta"),
    *both("normalization", "modernbert"),
    *both("last-token", "gpt2"),
    *both("mean", "bert", "mean", pooling="mean"),
    *both("answers", "bert", "QuestionAnswering"),
    *both("pictures", "vit", "image"),
    Case("instructions", "llama", "CausalLM"),
    Case("queries-and-values", "vit", "image", {"split_qkv": True}),
    Case("queries-and-keys-folded", "vit", "image", {
        "split_qkv": True, "train_head": False, "rslora": True, "lora_alpha": 5.0,
        "lora_targets": r"blocks\.\d+\.attn\.(qkv\.[qk]|proj)",
    }, folds=True),
    # The pooler and the head have adapters, too.
    Case("adapters-on-new-layers", "bert", changes={"train_head": False, "lora_targets": DENSE}),
    Case("folded", "roberta", changes={"train_head": False}, folds=True),
    Case("folded-on-new-layers", "roberta", changes={"train_head": False, "lora_targets": DENSE},
         folds=True),
    Case("stabilized", "roberta", changes={"train_head": False, "rslora": True}, folds=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """Return a folder with a checkpoint of each family; BERT's has no pooler."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("bert", "roberta", "modernbert", "gpt2"):
        shutil.copytree(checkpoint(family), folder / family)
    state = load_file(folder / "bert" / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "pooler" not in name}
    save_file(kept, folder / "bert" / "model.safetensors", {"format": "pt"})
    checkpoints.llama(folder / "llama", conversations.TEXTS)
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", num_classes=10, img_size=32), folder / "vit")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_reviews(folder / "reviews", train=6, test=4)
    write_pictures(folder / "pictures", train=6, valid=3)
    for split in ("train", "validation"):
        rows = [questions.row("bali balu mani", ("balu", 5))] * 2
        checkpoints.write_split(folder / "questions", split, rows)
        chats = [{"prompt": "bali", "response": "yes it is"}] * 2
        checkpoints.write_split(folder / "chats", split, chats)
    return folder


def config_of(case: Case, models: Path, data: Path) -> RunConfig:
    model = models / case.family
    if case.kind == "image":
        return image_config(
            data / "pictures", model=str(model), weights="pretrained", rank=3, **case.changes
        )
    if case.kind == "QuestionAnswering":
        changes = {"task": "question-answering", **case.changes}
        return text_config(model, data / "questions", **changes)
    if case.kind == "CausalLM":
        return text_config(model, data / "chats", task="instruction-tuning", **case.changes)
    return text_config(model, data / "reviews", **case.changes)


def export(case: Case, config: RunConfig, folder: Path) -> torch.Tensor:
    """Write an adapter and all that the other process needs; return the run's own predictions."""
    task: Any = build_task(config.task, config)
    adapted = build_adapted(config, task)
    fill(adapted)
    if case.folds:
        rng, pairs = np.random.default_rng(0), {}
        for layer in adapted.layers:
            b, a = folded_names(layer.name)
            pairs[b] = 0.3 * rng.normal(size=(layer.B.shape[0], 2)).astype(np.float32)
            pairs[a] = 0.3 * rng.normal(size=(2, layer.A.shape[1])).astype(np.float32)
        adapted.write(pairs)
    batch = task.made_up_batch(3)
    if case.kind == "image":
        inputs = {"x": batch["image"].float() / 255}
    else:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
    folder.mkdir()
    padding = None if case.kind == "image" else task._tokenizer.pad_token_id
    told = {"kind": case.kind, "model": config.model, "size": config.image_size, "padding": padding}
    (folder / "case.json").write_text(json.dumps(told))
    torch.save(inputs, folder / "inputs.pt")
    adapted.export(folder / "adapter")
    return loading.predictions(adapted.model, inputs)


@pytest.fixture(scope="module")
def exports(
    models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, torch.Tensor]:
    """Return a folder for each case, and what the run's own model predicts."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return {
            folder / case.name: export(case, config_of(case, models, data), folder / case.name)
            for case in CASES
        }


def test_every_exported_adapter_predicts_the_same_in_another_process_and_under_another_seed(
    exports: dict[Path, torch.Tensor],
) -> None:
    command = [sys.executable, "-m", "tests.data.loading", *map(str, exports)]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    for folder, ours in exports.items():
        bare, theirs = torch.load(folder / "found.pt")
        assert (theirs - ours).abs().max() < 2e-5, folder.name
        assert (theirs - bare).abs().max() > 1e-3, folder.name


def test_an_export_holds_no_more_than_adapters_and_what_was_drawn(
    exports: dict[Path, torch.Tensor],
) -> None:
    saved = {}
    for folder in exports:
        written = load_file(folder / "adapter" / "adapter_model.safetensors")
        saved[folder.name] = {
            name.removeprefix("base_model.model.") for name in written if "lora" not in name
        }
    linear = {"classifier.weight", "classifier.bias"}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    roberta = {f"classifier.{n}.{w}" for n in ("dense", "out_proj") for w in ("weight", "bias")}

    for train in ("trained", "frozen"):
        assert saved[f"pooler-{train}"] == linear | pooler
        assert saved[f"two-layers-{train}"] == roberta
        assert saved[f"last-token-{train}"] == {"score.weight"}
        assert saved[f"pictures-{train}"] == {"head.weight", "head.bias"}
        assert saved[f"answers-{train}"] == {"qa_outputs.weight", "qa_outputs.bias"}
    assert saved["instructions"] == set()
    assert saved["folded"] == roberta


def test_adapters_on_new_layers_alone_are_refused(models: Path, data: Path) -> None:
    config = text_config(
        models / "roberta",
        data / "reviews",
        train_head=False,
        lora_targets=r"classifier\.(dense|out_proj)",
    )
    with pytest.raises(InvalidValue, match=r"also matches a layer of the checkpoint"):
        build_adapted(config, build_task(config.task, config))


def test_a_language_model_without_its_scores_is_refused(
    models: Path, data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "llama"))
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = text_config(folder, data / "chats", task="instruction-tuning")
    with pytest.raises(InvalidValue, match="'lm_head' are missing"):
        build_task(config.task, config).build_model()
