from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from benchmarks.figures import Figure
from benchmarks.gpu import Pictures, Setting, full_size, measure_gpu
from tests.benchmarks.support import small_roberta


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without a GPU")
def test_without_a_gpu_every_figure_says_that_it_is_skipped() -> None:
    found: list[Figure] = []

    measure_gpu(full_size(), found.append)

    assert {(f.ours, f.note) for f in found} == {(None, "skipped: no CUDA GPU here")}
    assert [f.what for f in found] == [
        "Swin-B 224, b = 16, qkv, A, B and AB: time",
        "Swin-B 224, b = 16, all linears, A, B and AB: time",
        "Swin-B 224, b = 16, AB: private step in bf16",
        "Swin-B 224, b = 16, AB: private step in bf16, compiled",
        "Swin-B 224, b = 64, qkv, A, B and AB: time",
        "Swin-B 224, b = 64, all linears, A, B and AB: time",
        "Swin-B 224, b = 64, AB: private step in bf16",
        "Swin-B 224, b = 64, AB: private step in bf16, compiled",
        "RoBERTa-large 128, b = 128, q,v, A, B and AB: time",
        "RoBERTa-large 128, b = 128, all linears, A, B and AB: time",
        "RoBERTa-large 128, b = 128, AB: private step in bf16",
        "RoBERTa-large 128, b = 128, AB: private step in bf16, compiled",
        "a round of eight clients, 2 workers on one GPU",
        "a round of eight clients, 4 workers on one GPU",
    ]
    assert [f.bar for f in found] == [1.05, 1.05, 0.5, None] * 3 + [None] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_small_setting_is_measured_whole() -> None:
    found: list[Figure] = []

    measure_gpu(Setting(((small_roberta(), 3),), (1, 2), 1, 1), found.append)

    assert all(f.ratio for f in found)


def test_the_models_are_of_full_size_and_their_layers_are_found() -> None:
    for shape, _ in full_size().steps[1:]:
        with torch.device("meta"):
            model = shape.build()
        size = sum(p.numel() for p in model.parameters())
        assert size > {"Swin-B 224": 86e6, "RoBERTa-large 128": 354e6}[shape.name]
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        found = [
            sum(bool(re.fullmatch(pattern, name)) for name in names)
            for pattern in shape.targets.values()
        ]
        assert found == {"Swin-B 224": [24, 96], "RoBERTa-large 128": [48, 144]}[shape.name]


def test_the_task_of_the_rounds_has_records_and_the_layers_that_it_names() -> None:
    task = Pictures(None)
    assert len(task.client_records(3, 8)) == 64
    assert task.lora_targets == r".*attn\.qkv"
