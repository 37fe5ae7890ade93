from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora_flwr.bench.figures import Figure
from fedlora_flwr.bench.step import PHASES, Shape, _Bench, measure, roberta_base, swin_tiny


def small_roberta() -> Shape:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: nn.Module = RobertaForSequenceClassification(config)
        return model

    def batch(count: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "input_ids": torch.randint(3, 60, (count, 9), generator=generator),
            "attention_mask": torch.ones(count, 9, dtype=torch.int64),
            "label": torch.randint(0, 2, (count,), generator=generator),
        }

    def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return F.cross_entropy(model(**inputs).logits, batch["label"], reduction="none")

    return replace(roberta_base(), build=build, batch=batch, losses=losses)


def test_every_model_layer_choice_and_phase_gives_time_and_memory() -> None:
    found: list[Figure] = []
    shape = small_roberta()

    measure([shape], 3, 1, torch.device("cpu"), found.append)

    cells = len(shape.targets) * len(PHASES)
    against = [figure.against for figure in found]
    names = {"plain PEFT", "Opacus hooks", "Opacus ghost clipping"}
    assert {name: against.count(name) for name in names} == dict.fromkeys(names, 2 * cells)
    plain = [figure for figure in found if figure.against == "plain PEFT"]
    assert all(figure.ratio is not None for figure in plain)
    assert {f.bar for f in plain if f.what.endswith("time") and "q,v" in f.what} == {1.0}
    assert {f.bar for f in plain if f.what.endswith("time") and "all linears" in f.what} == {0.9}
    assert {f.bar for f in plain if f.what.endswith("memory")} == {1.03}
    # Opacus' hooks can follow this model, so that a change that breaks the comparison shows.
    hooks = [figure for figure in found if figure.against == "Opacus hooks"]
    assert all(figure.ratio is not None and figure.bar is None for figure in hooks)


@pytest.mark.parametrize("phase", PHASES)
def test_both_sides_train_the_same_arrays(phase: str) -> None:
    from fedlora_flwr.bench.step import _choose
    from fedlora_flwr.plan import factor_of

    bench = _Bench(small_roberta(), small_roberta().targets["q,v"], 3, torch.device("cpu"))
    ours = [
        p.numel()
        for name, p in bench.engine.adapted.parameters.items()
        if factor_of(name) in PHASES[phase]
    ]
    assert sorted(ours) == sorted(p.numel() for p in _choose(bench.plain, phase))


@pytest.mark.parametrize("shape", [swin_tiny(), roberta_base()], ids=["swin", "roberta"])
def test_the_models_are_of_full_size_and_their_layers_are_found(shape: Shape) -> None:
    with torch.device("meta"):
        model = shape.build()
    assert sum(p.numel() for p in model.parameters()) > 27e6
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = {
        layers: sum(bool(re.fullmatch(pattern, name)) for name in names)
        for layers, pattern in shape.targets.items()
    }
    narrow = {"Swin-T 224": {"qkv": 12}, "RoBERTa-base 128": {"q,v": 24}}[shape.name]
    wide = {"Swin-T 224": 48, "RoBERTa-base 128": 72}[shape.name]
    assert found == {**narrow, "all linears": wide}
