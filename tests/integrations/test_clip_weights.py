"""A private Hugging Face trainer whose clip norm is shared between adapters and head."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification, TrainingArguments

from fedlora_flwr import ClipWeights, PrivateTrainer

COUNT = 20
ROW = {"input_ids": [3, 4, 5], "labels": 1}


def moved(folder: Path, weights: ClipWeights, budget: float) -> dict[str, torch.Tensor]:
    """Return what one step of rate 1 over equal records moves, by name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    net = RobertaForSequenceClassification(RobertaConfig(num_attention_heads=1, **sizes, **off))
    lora = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"]
    )  # fmt: skip
    model = get_peft_model(net, lora)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        str(folder), max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=1e-3,
        per_device_train_batch_size=COUNT, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    PrivateTrainer(
        model, arguments, train_dataset=[ROW] * COUNT, epsilon=budget, delta=1e-2,
        clip_weights=weights,
    ).train()  # fmt: skip
    return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}


def split(found: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return adapters and head, each as one vector."""
    parts = [
        torch.cat([t.flatten() for n, t in found.items() if ("lora_" in n) is adapters])
        for adapters in (True, False)
    ]
    return parts[0], parts[1]


def test_weights_share_the_clip_norm_between_adapters_and_head(tmp_path: Path) -> None:
    adapters, head = split(moved(tmp_path, ClipWeights(head=0.01), math.inf))
    even, _ = split(moved(tmp_path / "even", ClipWeights(), math.inf))
    # C bounds what is clipped: the head's part times its weight.
    weighted = math.hypot(float(adapters.norm()), 0.01 * float(head.norm()))
    assert weighted == pytest.approx(1e-3, rel=1e-3)
    assert adapters.norm() > 1.5 * even.norm()


def test_the_noise_of_the_head_is_divided_by_its_weight(tmp_path: Path) -> None:
    weights = ClipWeights(head=0.01)
    quiet = moved(tmp_path / "quiet", weights, math.inf)
    noisy = moved(tmp_path / "noisy", weights, 1.0)
    # All records take part in both, so only the noise is left.
    adapters, head = split({name: noisy[name] - quiet[name] for name in quiet})
    assert float(head.std() / adapters.std()) == pytest.approx(100, rel=0.5)
