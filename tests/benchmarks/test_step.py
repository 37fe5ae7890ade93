from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks.figures import Figure
from benchmarks.step import (
    PHASES,
    Shape,
    StepBench,
    measure,
    roberta,
    swin,
)
from tests.benchmarks.support import small_roberta


def test_every_model_layer_choice_and_phase_gives_time_and_memory() -> None:
    found: list[Figure] = []
    shape = small_roberta()

    measure([shape], 3, 1, torch.device("cpu"), found.append)

    cells = len(shape.targets) * len(PHASES)
    against = [figure.against for figure in found]
    names = {"plain PEFT", "Opacus hooks", "Opacus ghost clipping"}
    assert {name: against.count(name) for name in names} == {
        name: 2 * cells + len(shape.targets) if name == "plain PEFT" else 3 for name in names
    }
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
    from benchmarks.step import _choose
    from fedlora_flwr.layout import factor_of

    bench = StepBench(small_roberta(), small_roberta().targets["q,v"], 3, torch.device("cpu"))
    ours = [
        p.numel()
        for name, p in bench.engine.adapted.parameters.items()
        if factor_of(name) in PHASES[phase]
    ]
    assert sorted(ours) == sorted(p.numel() for p in _choose(bench.plain, phase))


@pytest.mark.parametrize("shape", [swin(), roberta()], ids=["swin", "roberta"])
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
