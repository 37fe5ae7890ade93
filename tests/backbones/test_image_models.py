from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from fedlora_flwr.backbones.image_models import (
    build,
    classifier_modules,
    data_config,
    model_folder,
    skeleton,
)
from fedlora_flwr.errors import InvalidValue
from tests.data import hub
from tests.data.pictures import image_config
from tests.tasks.texts import state_digest

QKV = "blocks.0.attn.qkv.weight"
pytestmark = pytest.mark.usefixtures("empty_cache")


def made(classes: int = 3, **changes: Any) -> nn.Module:
    config = image_config(Path("unused"), **changes)
    return build(config, classes, config.seed)


def trained(name: str = "test_vit", classes: int = 10, size: int = 32) -> Any:
    """Return a model of timm's as if it had been trained: the seed draws no such weights."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return timm.create_model(name, num_classes=classes, img_size=size)


def same_but_for_the_head(found: nn.Module, expected: nn.Module) -> bool:
    state, wanted = found.state_dict(), expected.state_dict()
    heads = tuple(f"{name}." for name in classifier_modules(found))
    return state.keys() == wanted.keys() and all(
        torch.equal(state[name], wanted[name]) for name in state if not name.startswith(heads)
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_vit", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("test_resnet", ("fc",)),
        ("test_convnext", ("head.fc",)),
        ("test_efficientnet", ("classifier",)),
    ],
)
def test_the_seed_draws_the_weights_and_the_global_generator_stays(
    name: str, head: tuple[str, ...]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [made(model=name, seed=seed) for seed in (1, 1, 2)]
    bare = skeleton(image_config(Path("unused"), model=name), 3)

    assert torch.equal(torch.get_rng_state(), before)
    digests = [state_digest(model) for model in models]
    assert digests[0] == digests[1] != digests[2]
    assert classifier_modules(bare) == classifier_modules(models[0]) == head
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert [n for n, _ in bare.named_modules()] == [n for n, _ in models[0].named_modules()]
    assert models[0](torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped.pth", "bin"])
def test_weights_come_from_a_file(tmp_path: Path, form: str) -> None:
    state, file = trained().state_dict(), tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state, "epoch": 3} if form == "wrapped.pth" else state, file)

    other, again, seeded = (made(weights=str(file), seed=seed) for seed in (1, 1, 2))
    fits: Any = made(10, weights=str(file))

    assert same_but_for_the_head(other, trained())
    assert state_digest(other) == state_digest(again) != state_digest(seeded)
    assert same_but_for_the_head(seeded, trained())
    # A classifier for as many classes is taken with the rest.
    assert torch.equal(fits.head.weight, state["head.weight"])


def test_weights_for_pictures_of_another_size_are_fitted(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "weights.pth")
    found: Any = made(weights=str(tmp_path / "weights.pth"), image_size=64)
    assert torch.equal(found.state_dict()[QKV], trained().state_dict()[QKV])
    assert found.pos_embed.shape[1] == 17
    assert found(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_timms_is_a_model(tmp_path: Path, safe: bool) -> None:
    folder = tmp_path / "mine"
    save_for_hf(trained(), str(folder), model_args={"img_size": 32}, safe_serialization=safe)
    for name in [str(folder)] if safe else [str(folder), "~/mine"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(tmp_path))
            found = made(model=name, weights="pretrained", image_size=0)
        assert same_but_for_the_head(found, trained())
    random = made(model=str(folder), image_size=0)
    assert not torch.equal(random.state_dict()[QKV], found.state_dict()[QKV])


def test_a_model_that_was_made_here_is_found_by_its_name(empty_cache: Path) -> None:
    save_for_hf(trained(), str(model_folder("mine")), model_args={"img_size": 32})
    found = made(model="mine", weights="pretrained", image_size=0)
    assert same_but_for_the_head(found, trained())
    assert model_folder("mine") == empty_cache / "fedlora" / "models" / "mine"


def _folder(tmp_path: Path, damage: Callable[[Path], object]) -> str:
    save_for_hf(trained(), str(tmp_path / "mine"), safe_serialization=True)
    damage(tmp_path / "mine")
    return str(tmp_path / "mine")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def _other_weights(folder: Path) -> None:
    save_file(trained("test_vit2").state_dict(), folder / "model.safetensors")


def _half_the_weights(folder: Path) -> None:
    state = {k: v for k, v in trained().state_dict().items() if "blocks.5" not in k}
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "key", "allowed"),
    [
        (lambda f: (f / "config.json").unlink(), "model", r"a folder with config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "model", "that can be built"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "model",
            "KeyError: 'architecture'",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "model", r"with model\.safetensors"),
        (lambda f: _cut(f / "model.safetensors"), "weights", "safetensors or a PyTorch file"),
        (_other_weights, "weights", "does not fit"),
        (_half_the_weights, "weights", r"'blocks\.5\.norm1\.weight' is missing"),
    ],
)
def test_a_folder_that_is_no_model_is_one_error(
    tmp_path: Path, damage: Callable[[Path], object], key: str, allowed: str
) -> None:
    with pytest.raises(InvalidValue, match=allowed) as caught:
        made(model=_folder(tmp_path, damage), weights="pretrained", image_size=0)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


CONTENTS: dict[str, Callable[[], Any]] = {
    "list.pth": lambda: [1, 2],
    "whole.pth": trained,
    "swin.pth": lambda: trained("swin_tiny_patch4_window7_224").state_dict(),
    "numbers.pth": lambda: {"epoch": 3},
    "more.pth": lambda: {**trained().state_dict(), "more": torch.zeros(2)},
    "cut.pth": lambda: trained().state_dict(),
}


def _write(file: Path) -> None:
    if file.name in CONTENTS:
        torch.save(CONTENTS[file.name](), file)
    elif file.name == "text.pth":
        file.write_text("no weights")
    elif file.name == "cut.safetensors":
        save_file(trained().state_dict(), file)
    if file.stem == "cut":
        _cut(file)


@pytest.mark.parametrize(
    ("what", "allowed"),
    [
        ("cut.safetensors", "safetensors or a PyTorch file"),
        ("cut.pth", "safetensors or a PyTorch file"),
        ("text.pth", "safetensors or a PyTorch file"),
        ("list.pth", "safetensors or a PyTorch file"),
        # A pickle may run code; only tensors are read.
        ("whole.pth", "weights_only"),
        ("swin.pth", "does not fit"),
        ("numbers.pth", "'epoch' does not fit"),
        ("more.pth", "'more' does not fit"),
        ("away.pth", "a file that exists"),
    ],
)
def test_a_file_that_is_no_weights_of_the_model_is_one_error(
    tmp_path: Path, what: str, allowed: str
) -> None:
    _write(tmp_path / what)
    with pytest.raises(InvalidValue, match=allowed) as caught:
        made(weights=str(tmp_path / what))
    assert (caught.value.key, caught.value.value) == ("weights", str(tmp_path / what))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ("vit_tinny_patch16_224", "'vit_tiny_patch16_224'"),
        ("test_vit.nothing", r"Invalid pretrained tag \(nothing\)"),
        ("small-swin", "fedlora pretrain small-swin"),
        ("/no/such/folder", "a folder, or a name that timm knows"),
    ],
)
def test_an_unknown_name_is_refused_with_those_like_it(model: str, allowed: str) -> None:
    with pytest.raises(InvalidValue, match=allowed) as caught:
        made(model=model)
    assert (caught.value.key, caught.value.value) == ("model", model)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("test_vit", "pretrained"),
        ("hf-hub:timm/test_vit.r160_in1k", "pretrained"),
        # What the model is, is there too.
        ("hf-hub:timm/test_vit.r160_in1k", "random"),
    ],
)
def test_a_hub_that_is_away_is_one_error_that_says_how_to_go_on(
    model: str,
    weights: str,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub.away(monkeypatch, tmp_path / "hub", told=told)
    with pytest.raises(InvalidValue) as caught:
        made(model=model, weights=weights, image_size=0)
    assert (caught.value.key, caught.value.value) == ("model", model)
    assert "weights = a file" in caught.value.allowed
    assert "no copy from before" in caught.value.allowed
    assert asked == ([] if told else ["the.hub"])


@pytest.mark.parametrize("told", [False, True])
def test_a_copy_from_before_is_used(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    fetched = trained(classes=1000, size=160)
    (tmp_path / "fetched").mkdir()
    save_file(fetched.state_dict(), tmp_path / "fetched" / "model.safetensors")
    asked = hub.away(monkeypatch, tmp_path / "hub", told=told)
    hub.keep_copy(tmp_path / "hub", "timm/test_vit.r160_in1k", tmp_path / "fetched")

    first, again = (made(weights="pretrained", image_size=0, seed=4) for _ in range(2))

    assert same_but_for_the_head(first, fetched)
    assert state_digest(first) == state_digest(again)
    assert asked == ([] if told else ["the.hub"])
    assert told is constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(("size", "expected"), [(0, 160), (48, 48)])
def test_pictures_are_as_large_as_the_model_or_the_settings_say(size: int, expected: int) -> None:
    for name in ("test_vit", "test_convnext"):
        data = data_config(skeleton(image_config(Path("unused"), model=name), 3), size)
        assert data["input_size"] == [3, expected, expected]
        assert set(data) == {
            "input_size",
            "interpolation",
            "mean",
            "std",
            "crop_pct",
            "crop_mode",
        }


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantization_is_refused_by_name(bits: str) -> None:
    with pytest.raises(InvalidValue, match=f"quantization = '{bits}'.*only transformers"):
        made(quantization=bits)
