from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from fedlora_flwr.config import RunConfig
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.lora.build import lora_spec
from fedlora_flwr.lora.targets import check_targets, usual_targets
from fedlora_flwr.tasks.digits import DigitsTask
from tests.models import LLAMA, ROBERTA

SMALL = {"num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 8, "vocab_size": 20}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(num_hidden_layers=2, **SMALL))


def gpt2() -> Any:
    return GPT2ForSequenceClassification(
        GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=20, bos_token_id=1, eos_token_id=1)
    )


def vit() -> Any:
    with torch.device("meta"):
        return timm.create_model("test_vit", num_classes=3)


def refusal(model: nn.Module, targets: str, head: tuple[str, ...] = ()) -> str:
    with pytest.raises(InvalidValue) as caught:
        attach(model, LoRASpec(2, 4.0, 0.0, targets, head), seed=0)
    assert (caught.value.key, caught.value.value) == ("lora-targets", targets)
    assert "\n" not in str(caught.value)
    return caught.value.allowed


def layers(model: nn.Module, targets: str = "", head: tuple[str, ...] = ()) -> list[str]:
    adapted = attach(model, LoRASpec(2, 4.0, 0.0, targets, head), seed=0)
    return [layer.name for layer in adapted.layers]


def test_nothing_said_takes_what_is_usual_for_the_family() -> None:
    kinds = ("query", "value")
    assert layers(ROBERTA.model(), "", ("classifier",)) == [
        f"roberta.encoder.layer.{i}.attention.self.{kind}" for i in range(2) for kind in kinds
    ]
    assert layers(LLAMA.model()) == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"
    ]
    assert layers(gpt2(), "", ("score",)) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("distilbert", "transformer.layer.0.attention.q_lin"),
        ("modernbert", "model.layers.0.attn.Wqkv"),
        ("albert", "albert.layer.0.attention.value"),
        ("mine", "encoder.odd.name"),
        ("other", "deep.er"),
    ],
)
def test_families_are_known_from_the_given_table_or_our_own(family: str, layer: str) -> None:
    class Model(nn.Module):
        config = type("Config", (), {"model_type": family})()

    known = {"mine": ["odd.name"], "other": r"deep\..*"}
    pattern = usual_targets(Model(), (), known)
    assert re.fullmatch(pattern, layer)
    assert not re.fullmatch(pattern, layer + "s" if family != "other" else "Xdeep.er")
    assert not re.fullmatch(pattern, layer.replace(".", "-"))


def test_an_unknown_family_is_adapted_by_the_usual_names_of_attention() -> None:
    model = ROBERTA.model()
    expected = usual_targets(model, ("classifier",), {"roberta": ["query", "value"]})
    model.config.model_type = "bird"  # type: ignore[union-attr]
    assert usual_targets(model, ("classifier",), {}) == expected


def test_an_unknown_family_without_such_names_is_refused_with_layers_to_choose_from() -> None:
    class Bird(nn.Module):
        config = type("Config", (), {"model_type": "bird"})()

        def __init__(self) -> None:
            super().__init__()
            self.nest = nn.ModuleList(nn.ModuleDict({"egg": nn.Linear(2, 2)}) for _ in range(2))
            self.query, self.value = nn.Linear(2, 2), nn.Linear(2, 2)

    allowed = refusal(Bird(), "", ("query", "value"))
    assert "a bird has no usual layers" in allowed
    assert "'nest.0.egg'" in allowed
    assert "nest.1" not in allowed
    assert "query" not in allowed
    assert "a VisionTransformer has no usual layers" in refusal(vit(), "")


@pytest.mark.parametrize("shared", [False, True])
def test_deberta_is_adapted_beside_the_layers_that_read_positions(shared: bool) -> None:
    class Model(nn.Module):
        config = type("Config", (), {"model_type": "deberta-v2", "share_att_key": shared})()

    pattern = usual_targets(Model(), (), {"deberta-v2": ["query_proj", "value_proj"]})
    attention = "deberta.encoder.layer.0.attention"
    found = [
        name
        for name in ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")
        if re.fullmatch(pattern, f"{attention}.{name}")
    ]
    assert found == (
        ["self.value_proj", "output.dense"] if shared else ["self.query_proj", "self.value_proj"]
    )
    assert not re.fullmatch(pattern, "deberta.encoder.layer.0.output.dense")


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        (r".*\.(qeury|vlaue)", {"query", "value"}),
        ("query", {"query"}),
        (r".*layer\.\d+\.attention\.self\.queri", {"query"}),
        (r"encoder\.layer\.\d\.output\.dense", {"output.dense", "dense"}),
        ("all-linear", {"dense", "query", "key", "value"}),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_likeliest_first(
    targets: str, near: set[str]
) -> None:
    allowed = refusal(bert(), targets, ("classifier",))
    names = re.findall("'(.*?)'", allowed)
    assert "matches the whole name" in allowed
    assert all(any(name.endswith(end) for end in near) for name in names[: len(near)])
    assert set(names) <= {name for name, _ in bert().named_modules()}


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (r"patch_embed\.proj", "'patch_embed.proj' is a Conv2d"),
        (r".*\.proj", "'patch_embed.proj' is a Conv2d"),
        (r"blocks\.0\.attn", "'blocks.0.attn' is a Attention"),
        ("blocks", "'blocks' is a Sequential"),
        (r"blocks\.0\.norm1", "'blocks.0.norm1' is a LayerNorm"),
        (".*", "'the model' is a VisionTransformer"),
        ("head", "'head' trains in full (or train-head = false)"),
        (r"(blocks\.0\.attn\.qkv|head)", "'head' trains in full"),
    ],
)
def test_a_pattern_that_matches_something_else_is_refused_with_its_name(
    targets: str, what: str
) -> None:
    allowed = refusal(vit(), targets, ("head",))
    assert what in allowed
    if "trains" not in what:
        assert "linear layers are '" in allowed


def test_an_embedding_and_a_part_of_the_head_are_refused_with_their_names() -> None:
    words = "roberta.embeddings.word_embeddings"
    assert f"'{words}' is a Embedding" in refusal(ROBERTA.model(), r".*word_embeddings")
    allowed = refusal(ROBERTA.model(), r".*\.(query|out_proj)", ("classifier",))
    assert "'classifier.out_proj' trains in full" in allowed
    assert "classifier.out_proj" in layers(ROBERTA.model(), r".*\.(query|out_proj)")


def test_a_head_that_is_frozen_may_be_adapted_and_one_named_alike_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.head2 = nn.Linear(2, 2), nn.Linear(2, 2)

    assert layers(Model(), "head2?") == ["head", "head2"]
    assert layers(Model(), "head2", ("head",)) == ["head2"]


def test_a_model_without_linear_layers_is_told_so() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    assert "no linear layers outside its head" in refusal(model, "qkv", ("1",))
    assert "linear layers are '1'" in refusal(model, "qkv")


def test_one_layer_stands_for_those_that_differ_in_numbers() -> None:
    with pytest.raises(InvalidValue) as caught:
        check_targets(vit(), "nothing", ("head",))
    names = re.findall("'(.*?)'", caught.value.allowed)
    assert sorted(names) == [
        f"blocks.0.{name}" for name in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    ]


def test_what_is_no_regular_expression_is_refused() -> None:
    assert "a regular expression (" in refusal(bert(), "query(")


def test_attaching_to_gpt2_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    layers(gpt2(), r".*\.(c_attn|c_fc)", ("score",))
    assert not recwarn.list


def test_a_model_that_has_adapters_already_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    attach(model, LoRASpec(rank=2, alpha=4.0, dropout=0.0, targets="0"), seed=1)
    for taken in (model, nn.Sequential(model)):
        with pytest.raises(InvalidValue, match="one without PEFT's adapters"):
            attach(taken, LoRASpec(rank=2, alpha=4.0, dropout=0.0, targets=".*0"), seed=1)


class Odd(DigitsTask):
    """Handwritten digits whose members are of other types."""


@pytest.mark.parametrize(
    ("member", "value", "allowed"),
    [
        ("lora_targets", ["query", "value"], "one regular expression"),
        ("head", "classifier", "a tuple of the names"),
        ("head", (1,), "a tuple of the names"),
    ],
)
def test_members_of_a_task_of_another_type_are_named(
    member: str, value: object, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, member, value)
    with pytest.raises(InvalidValue, match=f"{member} of task 'digits'.*{allowed}"):
        lora_spec(RunConfig(), Odd(RunConfig()))
