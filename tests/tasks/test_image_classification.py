from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from fedlora_flwr.clients.trainer import LocalTrainer
from fedlora_flwr.data.pictures import image_column, normalized
from fedlora_flwr.errors import InvalidValue, PrivacyViolation
from fedlora_flwr.server.run_dir import RunDirectory
from fedlora_flwr.simulations.runner import prepare_run, run_in_process
from fedlora_flwr.tasks.image_classification import ImageClassification
from tests.data.pictures import CLASSES, MODES, image_config, picture, write_pictures
from tests.models import plain_parameters
from tests.tasks.texts import fill, gradients_alone

Make = Callable[..., ImageClassification]
TARGETS = r"(.*\.)?blocks\.\d+\.attn\.(qkv|proj)"
# Head and adapted layers.
MODELS = {
    "test_vit": (("head",), 12),
    "swin_tiny_patch4_window7_224": (("head.fc",), 24),
    "deit_tiny_distilled_patch16_224": (("head", "head_dist"), 24),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def make_task(folder: Path, empty_cache: Path) -> Make:
    return lambda **changes: ImageClassification(image_config(folder, **changes))


@pytest.mark.parametrize("model", MODELS)
def test_timms_transformers_are_adapted_and_clipped_record_by_record(
    make_task: Make, model: str
) -> None:
    task = make_task(model=model, rank=3)
    trainer = LocalTrainer.build(task._settings, task)
    records, (head, layers) = task.client_records(0, 2), MODELS[model]
    fill(trainer.adapted)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=TARGETS, modules_to_save=list(head))
    twin = get_peft_model(task.build_model(), config).eval()
    with torch.no_grad():
        for name, parameter in plain_parameters(twin).items():
            parameter.copy_(trainer.adapted.parameters[name])
    indices, names = torch.tensor([4, 0, 7]), list(trainer.adapted.parameters)

    trainer.engine.verify(records)
    found = trainer.engine.gradients_by_record(records, indices, names)

    assert task.head == head
    assert len(trainer.adapted.layers) == layers
    expected = gradients_alone(task, twin, records, indices)
    for name in names:
        scale = expected[name].norm().item()
        assert scale > 0
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4 * scale)


def test_queries_and_values_of_a_fused_layer_are_adapted_apart(make_task: Make) -> None:
    whole, task = make_task(), make_task(split_qkv=True, rank=3)
    fused, batch = whole.build_model().eval(), whole.made_up_batch(2)
    trainer = LocalTrainer.build(task._settings, task)
    with torch.no_grad():
        expected = whole._logits(fused, batch)
        torch.testing.assert_close(task._logits(trainer.adapted.model, batch), expected)
    names = {layer.name.rpartition(".")[2] for layer in trainer.adapted.layers}
    assert names == {"q", "v"}

    # One third of the fused layer's outputs moves for each adapter, and no other.
    fill(trainer.adapted)
    layer = trainer.adapted.layers[0]
    fused_layer = fused.get_submodule(layer.name.rpartition(".")[0])
    x = torch.randn(5, layer.A.shape[1])
    parent = trainer.adapted.model.get_base_model().get_submodule(layer.name.rpartition(".")[0])
    with torch.no_grad():
        moved = (parent(x) - fused_layer(x)).view(5, 3, -1).abs().amax(dim=(0, 2))
    assert moved[0] > 1e-3
    assert moved[2] > 1e-3
    assert moved[1] < 1e-5

    config = LoraConfig(r=3, lora_alpha=8, target_modules=r".*\.qkv\.[qv]")
    twin = get_peft_model(task.build_model(), config).eval()
    own = trainer.adapted.parameters
    with torch.no_grad():
        for name, parameter in plain_parameters(twin).items():
            parameter.copy_(own[name])
        for name in ("weight", "bias"):
            twin.get_submodule("base_model.model.head").get_parameter(name).copy_(
                own[f"head.{name}"]
            )
    records, indices = task.client_records(0, 2), torch.tensor([4, 0, 7])
    trainer.engine.verify(records)
    found = trainer.engine.gradients_by_record(records, indices, list(own))
    for name, gradients in gradients_alone(task, twin, records, indices).items():
        scale = gradients.norm().item()
        assert scale > 0
        torch.testing.assert_close(found[name], gradients, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("model", ["test_convnext", "beit_base_patch16_224"])
def test_a_model_whose_attention_cannot_be_split_is_refused(make_task: Make, model: str) -> None:
    with pytest.raises(InvalidValue, match="split-qkv"):
        make_task(model=model, split_qkv=True, image_size=0).skeleton()


def test_a_layer_whose_weight_timm_reads_itself_is_refused_by_name(
    make_task: Make, tmp_path: Path
) -> None:
    # Swin V2 does not call its qkv layer, so an adapter on it would not run.
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    model = timm.create_model("swinv2_tiny_window8_256", img_size=32, **sizes)
    save_for_hf(model, str(tmp_path / "v2"), model_args={"img_size": 32, **sizes})
    for targets in (TARGETS, ""):
        task = make_task(model=str(tmp_path / "v2"), image_size=0, lora_targets=targets)
        trainer = LocalTrainer.build(task._settings, task)
        records = task.client_records(0, 2)
        if targets:
            with pytest.raises(PrivacyViolation, match=r"'layers\.0\.blocks\.0\.attn\.qkv\.lora_A"):
                trainer.engine.verify(records)
        else:
            trainer.engine.verify(records)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("model", "size"),
    [("test_vit", 32), ("test_vit", 0), ("test_convnext", 48), ("deit_tiny_patch16_224", 0)],
)
def test_pixels_are_those_of_timms_own_transform(
    make_task: Make, model: str, size: int, mode: str, tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "set", train=3, valid=3, modes=[mode])
    task = make_task(model=model, image_size=size, dataset=str(folder))
    built = task.build_model()
    theirs = resolve_model_data_config(built, {"input_size": (3, size, size)} if size else {})
    transform = create_transform(**theirs, is_training=False)
    batch = task.test_records().batch(torch.arange(3))

    found = normalized(batch["image"], task._data)

    assert batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [0, 1, 2]
    # Where a picture is laid over white, the two ways differ by one level of 255 at most.
    allowed = 1e-6 if mode in ("RGB", "L") else 1.01 / 255 / min(theirs["std"])
    for number in range(3):
        shown = picture(300 + number, mode).convert("RGBA")
        opaque = Image.new("RGB", shown.size, "white")
        opaque.paste(shown.convert("RGB"), mask=shown.getchannel("A"))
        assert (found[number] - transform(opaque)).abs().max() <= allowed
    assert found.shape == task.largest_batch(3)["image"].shape == (3, *theirs["input_size"])
    seen: list[torch.Tensor] = []
    built.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses = task.losses(built.eval(), batch)
    torch.testing.assert_close(seen[0], found)
    assert losses.shape == (3,)


def test_pictures_are_made_once(make_task: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_task().test_records().batch(torch.arange(9))
    make_task().client_records(0, 1)

    def decoded(*arguments: object) -> None:
        raise AssertionError("a picture was decoded again")

    monkeypatch.setattr(Image.Image, "load", decoded)
    monkeypatch.setattr(Image.Image, "convert", decoded)
    again = make_task(seed=3, num_clients=2)
    batch = again.test_records().batch(torch.arange(9))
    assert all(torch.equal(first[name], batch[name]) for name in first)
    assert len(again.client_records(0, 2)) == 12
    with pytest.raises(AssertionError, match="decoded again"):
        make_task(image_size=16).test_records()


def test_a_private_run_learns(tmp_path: Path, empty_cache: Path) -> None:
    config = image_config(
        write_pictures(tmp_path / "many", train=900, valid=60),
        num_clients=2,
        num_rounds=2,
        local_steps=8,
        batch_size=150,
        strategy="rolora",
        image_size=16,
        lr_a=0.5,
        lr_b=0.5,
        lr_head=0.5,
        delta=1e-4,
    )
    rows: list[Any] = []
    summary = run_in_process(prepare_run(config), RunDirectory(tmp_path / "run"), rows.append)

    assert summary["status"] == "completed"
    assert 7.8 < summary["epsilon_max"] <= 8
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.2


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("test_vit", {"rslora": True, "lora_dropout": 0.2}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("swin_tiny_patch4_window7_224", {}),
    ],
)
def test_plain_peft_loads_the_export_and_predicts_the_same(
    make_task: Make, model: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    task = make_task(model=model, **changes)
    trainer = LocalTrainer.build(task._settings, task)
    fill(trainer.adapted)
    trainer.adapted.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(task.build_model(), str(tmp_path / "adapter")).eval()
    batch = task.test_records().batch(torch.arange(3))

    with torch.no_grad():
        ours, theirs = (task._logits(model, batch) for model in (trainer.adapted.model, loaded))
        bare = task._logits(task.build_model().eval(), batch)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - bare).abs().max() > 0.01
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == list(task.head)


def test_columns_of_a_table_of_pictures_are_found_or_named(make_task: Make, tmp_path: Path) -> None:
    rows = {
        "picture": [picture(number) for number in range(6)],
        "mask": [picture(number + 50, "L") for number in range(6)],
        "fine": [f"kind {number % 2}" for number in range(6)],
        "label": [9] * 6,
    }
    saved = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    saved = saved.cast_column("mask", datasets.Image())
    for split in ("train", "valid"):
        saved.to_parquet(str(tmp_path / "table" / f"{split}.parquet"))
    usual = {"dataset": str(tmp_path / "table"), "label_column": "fine", "image_size": 40}
    found = [
        make_task(**usual, input_columns=column).test_records().batch(torch.arange(6))
        for column in ("picture", "mask")
    ]
    assert found[0]["label"].tolist() == [0, 1] * 3
    assert not torch.equal(found[0]["image"], found[1]["image"])
    for column, allowed in (("", "'mask', 'picture'"), ("picture,mask", ""), ("fine", "'mask'")):
        with pytest.raises(InvalidValue, match=rf"input-columns = .*{allowed}"):
            make_task(**usual, input_columns=column).test_records()
    assert image_column(saved.remove_columns("mask"), "") == "picture"
    with pytest.raises(InvalidValue, match="a column of pictures"):
        image_column(saved.select_columns("fine"), "")


@pytest.mark.parametrize("kept", [0, 20, 700])
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_a_picture_that_cannot_be_decoded_is_one_error(
    make_task: Make, tmp_path: Path, form: str, kept: int
) -> None:
    folder = write_pictures(tmp_path / "set", train=3, valid=3, modes=["RGB"])
    file = folder / "valid" / "bee" / f"x.{form}"
    picture(1).save(file)
    file.write_bytes(file.read_bytes()[:kept] or b"broken")
    task = make_task(dataset=str(folder))
    assert len(task.client_records(0, 1)) == 3
    with pytest.raises(InvalidValue, match="pictures that can be decoded"):
        task.test_records()


def test_classes_are_the_folders_of_all_splits(make_task: Make) -> None:
    task = make_task()
    assert task.num_classes == len(CLASSES)
    assert task.build_model().get_submodule("head").out_features == len(CLASSES)
    assert make_task(num_classes=7).build_model().get_submodule("head").out_features == 7
    labels = task.client_records(0, 1).batch(torch.arange(24))["label"].numpy()
    assert np.bincount(labels).tolist() == [8, 8, 8]
