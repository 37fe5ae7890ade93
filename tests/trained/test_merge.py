"""`merge`: plain models whose outputs are those of the adapter, as other libraries load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

from fedlora_flwr import merge, predict
from fedlora_flwr.backbones.pretrain_digits import build_vit
from fedlora_flwr.cli import app
from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from tests.backbones import checkpoints
from tests.data.pictures import image_config, write_pictures
from tests.tasks import conversations
from tests.tasks.texts import make_checkpoint, text_config, write_reviews
from tests.trained.folders import exported

TEXT = "the film was lovely"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_text_model_is_one_of_transformers(tmp_path: Path, kind: str) -> None:
    base, data = make_checkpoint(kind, tmp_path / "base"), write_reviews(tmp_path / "films")
    config = text_config(base, data, input_columns="text", class_names="bad,good")
    _, adapted = exported(config, tmp_path / "adapter")
    arguments = ["merge", tmp_path / "adapter", "-o", tmp_path / "model", "-c", f"model={base}"]

    done = CliRunner().invoke(app, [*map(str, arguments)])

    assert done.exit_code == 0, done.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    inputs = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT, return_tensors="pt")
    if kind == "llama":
        inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        wanted = adapted.model(**inputs).logits
        bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
        assert not torch.allclose(bare(**inputs).logits, wanted, atol=1e-2)
        torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_model_read_by_the_mean_is_its_backbone_and_the_layer_on_it(tmp_path: Path) -> None:
    base, data = make_checkpoint("bert", tmp_path / "base"), write_reviews(tmp_path / "films")
    config = text_config(base, data, input_columns="text", pooling="mean")
    _, adapted = exported(config, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model", model=base)
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    layer = load_file(tmp_path / "model" / "classifier.safetensors")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**inputs).last_hidden_state.mean(dim=1)
        found = mean @ layer["weight"].T + layer["bias"]
        torch.testing.assert_close(found, adapted.model(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_a_model_of_pictures_is_one_of_timm(tmp_path: Path, split: bool) -> None:
    config = image_config(write_pictures(tmp_path / "pictures"), split_qkv=split)
    if split:
        config = RunConfig.of(config.items(), {"lora-targets": r".*\.qkv\.[qv]"})
    task, adapted = exported(config, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = adapted.model(pictures)
        torch.testing.assert_close(model(pictures), wanted, atol=1e-5, rtol=1e-4)
    assert len(task.class_names()) == model.num_classes == 3


def test_a_chat_model_answers_as_its_adapter_does(tmp_path: Path) -> None:
    base = checkpoints.llama(tmp_path / "base", conversations.TEXTS)
    rows = [{"prompt": "bali balu", "response": "yes it is"}] * 6
    for name in ("train", "validation"):
        checkpoints.write_split(tmp_path / "chats", name, rows)
    config = text_config(
        base, tmp_path / "chats", task="instruction-tuning", max_length=48, max_new_tokens=48,
        lora_targets=conversations.LAYERS["llama"],
    )  # fmt: skip
    exported(config, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model", model=base)
    said = predict(tmp_path / "adapter", Dataset.from_list([{"prompt": "dasi bali"}]), model=base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "dasi bali"}]
    options: Any = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(chat, **options)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0]
    answer = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said["answer"].tolist() == [answer]
    assert answer


def test_of_another_model_the_weights_are_written(tmp_path: Path) -> None:
    _, adapted = exported(RunConfig(device="cpu"), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "model")
    model = build_vit()
    model.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    pictures = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = adapted.model(pictures)
        torch.testing.assert_close(model.eval()(pictures), wanted, atol=1e-5, rtol=1e-4)


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    exported(RunConfig(device="cpu"), tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    with pytest.raises(InvalidValue, match="expected a folder that does not exist"):
        merge(tmp_path / "adapter", tmp_path / "model")
    with pytest.raises(InvalidValue, match="reads no files"):
        predict_digits(tmp_path)


def predict_digits(folder: Path) -> None:
    from fedlora_flwr import evaluate

    evaluate(folder / "adapter", Dataset.from_list([{"label": 1}]))
