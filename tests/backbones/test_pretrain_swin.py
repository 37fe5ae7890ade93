from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file
from timm.models import save_for_hf

from fedlora_flwr.backbones.image_models import (
    SMALL_SWIN,
    build,
    classifier_modules,
    data_config,
    model_folder,
)
from fedlora_flwr.backbones.pretrain_swin import (
    MODEL_ARGS,
    SwinRecipe,
    augmented,
    build_swin,
    pretrain_swin,
)
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.tasks.image_classification import ImageClassification
from tests.data.pictures import image_config, picture, write_pictures

QUICK = SwinRecipe(classes=2, epochs=1, batch=8, learning_rate=1e-3)
pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return 24 pictures of three classes, and 9 to measure on."""
    return write_pictures(tmp_path / "pictures")


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_the_small_swin_is_trained_kept_and_found_by_its_name(source: Path) -> None:
    torch.manual_seed(8)
    before = torch.get_rng_state()
    console = quiet()
    folder = pretrain_swin(str(source), QUICK, console=console)
    card = json.loads((folder / "card.json").read_text())
    state = load_file(folder / "model.safetensors")

    assert torch.equal(torch.get_rng_state(), before)
    assert folder == model_folder(SMALL_SWIN)
    assert {path.name for path in folder.iterdir()} == {
        "card.json",
        "config.json",
        "model.safetensors",
    }
    assert [path.name for path in folder.parent.iterdir()] == [SMALL_SWIN]
    assert card["recipe"]["classes"] == 2
    assert (card["model"], card["records"], card["device"]) == (SMALL_SWIN, 16, "cpu")
    assert card["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert card["seconds"] > 0
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]

    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(plain.state_dict()[name], state[name]) for name in state)
    assert data_config(plain, 0)["input_size"] == [3, 32, 32]
    assert data_config(plain, 0)["crop_pct"] == 1.0
    valid = ImageClassification(
        image_config(source, model=SMALL_SWIN, weights="pretrained", image_size=0, num_classes=3)
    )
    records = valid.test_records()
    batch = records.batch(torch.arange(9))
    with torch.no_grad():
        scores = valid._logits(plain.eval(), batch)
    known = batch["label"] < 2
    hits = (scores.argmax(1) == batch["label"])[known].double().mean().item()
    assert card["accuracy"] == pytest.approx(hits)


def test_training_follows_the_seed_and_learns(source: Path) -> None:
    weights, accuracies = [], []
    for seed, epochs in ((0, 1), (0, 1), (1, 1), (0, 6)):
        recipe = SwinRecipe(classes=3, epochs=epochs, batch=8, learning_rate=1e-3, seed=seed)
        console = quiet()
        folder = pretrain_swin(str(source), recipe, console=console)
        weights.append(load_file(folder / "model.safetensors")["head.fc.weight"])
        accuracies.append(json.loads((folder / "card.json").read_text())["accuracy"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    # Thirds are chance.
    assert accuracies[3] > 0.6
    assert "Epoch 5 of 6: " in console.file.getvalue()  # type: ignore[attr-defined]


def test_fewer_pictures_than_a_batch_are_one_step_an_epoch(source: Path) -> None:
    recipe = SwinRecipe(classes=3, epochs=1, batch=128)
    card = json.loads(
        (pretrain_swin(str(source), recipe, console=quiet()) / "card.json").read_text()
    )
    assert card["records"] == 24


def test_a_head_for_other_classes_follows_the_seed(source: Path) -> None:
    save_for_hf(build_swin(100), str(model_folder(SMALL_SWIN)), model_args=MODEL_ARGS)
    first, again, other = (
        build(
            image_config(source, model=SMALL_SWIN, weights="pretrained", image_size=0),
            3,
            seed,
        ).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert changed == ["head.fc.weight"]


def test_pictures_are_mirrored_and_moved_and_edges_repeat() -> None:
    size = 12
    ramp = torch.arange(size * size, dtype=torch.uint8).view(1, 1, size, size)
    images = ramp.expand(400, 3, size, size)
    found = augmented(images, torch.Generator().manual_seed(0))
    again = augmented(images, torch.Generator().manual_seed(0))

    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert torch.equal(found, again)
    mirrored, moves = 0, set()
    for one in found:
        assert torch.equal(one[0], one[2])
        whole = one[0].long()
        flipped = bool((whole[6, 1:] < whole[6, :-1]).any())
        mirrored += flipped
        straight = whole.flip(1) if flipped else whole
        rows, columns = straight[:, 6] // size, straight[6] % size
        moves.add((int(rows[6]) - 6, (int(columns[6]) - 6) * (-1 if flipped else 1)))
        assert torch.equal(straight, rows[:, None] * size + columns)
        steps = (rows[1:] - rows[:-1]).tolist() + (columns[1:] - columns[:-1]).tolist()
        assert set(steps) <= {0, 1}
    assert 150 < mirrored < 250
    assert {abs(move) for pair in moves for move in pair} <= {0, 1, 2, 3, 4, 5}
    assert len({down for down, _ in moves}) == 9
    assert torch.equal(images[0], ramp[0].expand(3, size, size))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [(SwinRecipe(classes=5), r"classes 0 to 4; 'train' has none of \[3, 4\]")],
)
def test_classes_without_pictures_are_refused(
    source: Path, recipe: SwinRecipe, message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        pretrain_swin(str(source), recipe, console=quiet())
    assert not model_folder(SMALL_SWIN).exists()


def test_pictures_of_other_classes_or_none_are_left_out(tmp_path: Path) -> None:
    rows = {"image": [picture(i) for i in range(6)], "label": [0, 1, -1, 5, 1, 0]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for split in ("train", "valid"):
        table.to_parquet(str(tmp_path / "table" / f"{split}.parquet"))
    folder = pretrain_swin(str(tmp_path / "table"), QUICK, console=quiet())
    assert json.loads((folder / "card.json").read_text())["records"] == 4


def test_records_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InvalidValue, match=r"source = .*'label'"):
        pretrain_swin(str(tmp_path / "train.jsonl"), QUICK, console=quiet())


def test_the_small_swin_is_small_and_clips_by_window() -> None:
    model: Any = build_swin(200)
    assert 5.0e6 < sum(p.numel() for p in model.parameters()) < 5.3e6
    assert classifier_modules(model) == ("head.fc",)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 200)
    grids = [tuple(layer.blocks[0].input_resolution) for layer in model.layers]
    assert grids == [(8, 8), (4, 4), (2, 2)]
