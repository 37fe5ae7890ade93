from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from fedlora_flwr.backbones.language_models import (
    MeanPooled,
    check_length,
    head_modules,
    input_names,
    quantized,
    skeleton,
)
from fedlora_flwr.errors import InvalidValue, NotInstalled
from fedlora_flwr.tasks.text_classification import TextClassification
from tests.data import hub
from tests.tasks.texts import set_in_config, state_digest, text_config, write_reviews

Checkpoint = Callable[[str], Path]
Make = Callable[..., TextClassification]


@pytest.fixture
def make_task(checkpoint: Checkpoint, tmp_path: Path, empty_cache: Path) -> Make:
    data = write_reviews(tmp_path / "reviews", train=6, test=2)

    def make(model: Path | str | None = None, **changes: Any) -> TextClassification:
        return TextClassification(text_config(model or checkpoint("bert"), data, **changes))

    return make


@pytest.fixture
def copy_of(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a checkpoint to a place where it may be changed."""
    return lambda kind: Path(shutil.copytree(checkpoint(kind), tmp_path / f"my-{kind}"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("told", [False, True])
def test_a_hub_that_is_away_is_one_error_that_says_how_to_go_on(
    make_task: Make,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub.away(monkeypatch, tmp_path / "hub", told=told)

    with pytest.raises(InvalidValue) as caught:
        make_task("FacebookAI/roberta-base").build_model()

    assert (caught.value.key, caught.value.value) == ("model", "FacebookAI/roberta-base")
    assert "a folder with a transformers model" in caught.value.allowed
    assert "no copy from before" in caught.value.allowed
    assert asked == ([] if told else ["the.hub"])


@pytest.mark.parametrize("told", [False, True])
def test_a_copy_from_before_is_used_and_nothing_is_asked(
    make_task: Make,
    checkpoint: Checkpoint,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub.away(monkeypatch, tmp_path / "hub", told=told)
    hub.keep_copy(tmp_path / "hub", "someone/bert", checkpoint("bert"))

    model = make_task("someone/bert").build_model()

    assert state_digest(model) == state_digest(make_task().build_model())
    # The one question whether anybody is there.
    assert asked == ([] if told else ["the.hub"])


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _no_layer(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if "layer.1." in name]:
            del state[name]

    change_weights(folder, change)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _no_padding(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in words.items() if k not in ("pad_token",)}))


def _slow_tokenizer(folder: Path) -> None:
    _no_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (_cut, "Error while deserializing"),
    "no-layer": (_no_layer, "weights of this model: 'bert.encoder.layer.1."),
    "wider": (lambda f: set_in_config(f, hidden_size=64), "does not fit"),
    "deeper": (lambda f: set_in_config(f, num_hidden_layers=3), "layer.2.*is missing"),
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no-json": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "no-type": (lambda f: set_in_config(f, model_type="bird"), "model type `bird`"),
    "a-picture": (lambda f: set_in_config(f, model_type="vit"), "not one of type 'vit'"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "no file named"),
    "no-tokenizer": (_no_tokenizer, "with a tokenizer"),
    "slow-tokenizer": (_slow_tokenizer, "fast tokenizer"),
    "no-padding": (_no_padding, "a token for padding"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_is_no_model_is_one_error(
    make_task: Make, copy_of: Callable[[str], Path], what: str
) -> None:
    folder, (damage, allowed) = copy_of("bert"), BROKEN[what]
    damage(folder)

    with pytest.raises(InvalidValue, match=allowed) as caught:
        make_task(folder).build_model()

    assert (caught.value.key, caught.value.value) == ("model", str(folder))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(
    make_task: Make, copy_of: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    folder = copy_of("bert")
    shutil.copy(checkpoint("distilbert") / "model.safetensors", folder)
    for pooling in ("model", "mean"):
        with pytest.raises(InvalidValue, match="weights of this model"):
            make_task(folder, pooling=pooling).build_model()


def test_a_file_is_no_model_and_no_weights_of_one(make_task: Make, checkpoint: Checkpoint) -> None:
    file = str(checkpoint("bert") / "model.safetensors")
    with pytest.raises(InvalidValue, match=r"weights = .*of your own set model"):
        make_task(weights=file).build_model()
    with pytest.raises(InvalidValue, match=r"model = .*a folder"):
        make_task(file).build_model()


def test_a_backbone_without_a_pooler_gets_one_that_the_seed_draws(
    make_task: Make, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("bert")

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith("pooler")]:
            del state[name]

    change_weights(folder, change)

    first, again = (make_task(folder).build_model() for _ in range(2))
    assert state_digest(first) == state_digest(again)
    assert state_digest(first) != state_digest(make_task().build_model())


def test_a_head_is_taken_from_the_checkpoint_if_it_fits(
    make_task: Make, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of("bert")
    tuned: Any = make_task(folder).build_model()
    with torch.no_grad():
        tuned.classifier.weight.fill_(0.25)
    tuned.save_pretrained(folder)

    fits: Any = make_task(folder, num_classes=2).build_model()
    other: Any = make_task(folder, num_classes=5).build_model()

    assert torch.equal(fits.classifier.weight, tuned.classifier.weight)
    assert other.classifier.weight.shape == (5, 32)
    assert other.classifier.weight.std() > 0
    for name, tensor in tuned.bert.state_dict().items():
        assert torch.equal(other.bert.state_dict()[name], tensor)


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_seed_draws_what_is_new_and_the_global_generator_stays(
    make_task: Make, weights: str, pooling: str
) -> None:
    made = [make_task(weights=weights, pooling=pooling, seed=seed) for seed in (1, 1, 2)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    digests = []
    for task in made:
        digests.append(state_digest(task.build_model()))
        assert task.head == ("classifier",)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        before = torch.get_rng_state()

    assert digests[0] == digests[1] != digests[2]
    assert all(parameter.is_meta for parameter in made[0].skeleton().parameters())


def test_weights_of_half_precision_are_read_in_full(
    make_task: Make, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("bert")
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    for pooling in ("model", "mean"):
        model = make_task(folder, pooling=pooling).build_model()
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_a_text_beyond_the_models_positions_is_refused_before_weights_are_read(
    make_task: Make, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidValue, match="max-length = 65"):
        make_task(folder, max_length=65).build_model()


def test_random_weights_are_not_the_checkpoints(make_task: Make) -> None:
    pretrained, random = (make_task(weights=w).build_model() for w in ("pretrained", "random"))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(pretrained.state_dict()[name], random.state_dict()[name])
    assert {tensor.dtype for tensor in random.parameters()} == {torch.float32}


def test_mean_pooling_is_the_mean_over_the_texts_tokens(make_task: Make) -> None:
    model: Any = make_task(pooling="mean").build_model().eval()
    tokens = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 8, 3, 0, 0, 0]])
    mask = (tokens != 0).long()
    with torch.no_grad():
        states = model.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        means = torch.stack([states[0, :4].mean(0), states[1, :3].mean(0)])
        found = model(input_ids=tokens, attention_mask=mask).logits
        nothing = model(input_ids=tokens, attention_mask=mask * 0).logits
        torch.testing.assert_close(found, model.classifier(means), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nothing, model.classifier.bias.expand(2, 2))


def test_heads_are_what_is_beside_the_backbone_and_linear(checkpoint: Checkpoint) -> None:
    for kind, head in (("albert", ("classifier",)), ("modernbert", ("head.dense", "classifier"))):
        from transformers import AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(checkpoint(kind))
        model = skeleton(AutoModelForSequenceClassification, config)
        assert head_modules(model) == head
        assert head_modules(skeleton(MeanPooled, config)) == ("classifier",)
        assert head_modules(skeleton(AutoModel, config)) != ()


@pytest.mark.parametrize(
    ("kind", "types", "longest"),
    [
        ("bert", True, 64),
        ("roberta", False, 64),
        ("distilbert", False, 64),
        ("llama", False, 256),
        ("gpt2", False, 256),
    ],
)
def test_inputs_and_lengths_are_the_models_own(
    checkpoint: Checkpoint, kind: str, types: bool, longest: int
) -> None:
    config = AutoConfig.from_pretrained(checkpoint(kind))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(kind))
    names = ["input_ids", "attention_mask"]
    assert input_names(tokenizer, config) == names + ["token_type_ids"] * types
    tokenizer.model_input_names = ["input_ids"]
    assert input_names(tokenizer, config) == names

    model = skeleton(AutoModel, config)
    check_length(longest, model)
    with pytest.raises(InvalidValue, match=f"max-length = {longest + 1} .*at most {longest}"):
        check_length(longest + 1, model)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_backbone_is_quantized_and_its_head_is_not(
    bits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but the kernels: an empty package stands for bitsandbytes."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    about = tmp_path / "bitsandbytes-0.49.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.49.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    options = quantized(bits, ("classifier",))

    chosen = options["quantization_config"]
    assert (chosen.load_in_8bit, chosen.load_in_4bit) == (bits == "8bit", bits == "4bit")
    assert chosen.llm_int8_skip_modules == ["classifier"]
    assert options["device_map"] == {"": 1}
    if bits == "4bit":
        assert (chosen.bnb_4bit_quant_type, chosen.bnb_4bit_compute_dtype) == (
            "nf4",
            torch.bfloat16,
        )


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantization_is_refused_where_it_cannot_be_had(
    make_task: Make, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match=f"quantization = '{bits}'.*CUDA"):
        make_task(quantization=bits).build_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(NotInstalled, match=r"pip install 'fedlora-flwr\[quantized\]'"):
        make_task(quantization=bits).build_model()
    assert quantized("none", ()) == {}
