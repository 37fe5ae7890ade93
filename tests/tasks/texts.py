"""Toy texts with an opinion, and a tiny checkpoint of each family that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
)

from fedlora_flwr.config import RunConfig
from fedlora_flwr.data.records import Records
from fedlora_flwr.lora.adapters import AdaptedModel
from fedlora_flwr.tasks.dataset_task import DatasetTask
from tests.backbones import checkpoints
from tests.models import plain_parameters

GOOD, BAD = ("fine", "great", "lovely", "superb"), ("poor", "awful", "dull", "bleak")
OTHER = ("the", "film", "was", "a", "plot", "and", "very", "so")
ALL = [" ".join((*GOOD, *BAD, *OTHER))] * 3
TARGETS = {
    "bert": r".*\.(query|value)",
    "roberta": r".*\.(query|value)",
    "distilbert": r".*\.(q_lin|v_lin)",
    "albert": r".*\.(query|value)",
    "modernbert": r".*\.Wqkv",
    "llama": r".*\.(q_proj|v_proj)",
    "gpt2": r".*\.c_attn",
}


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return texts of 2 to 13 words, of which one tells the class."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(count):
        label = int(draw.integers(2))
        words = [str(word) for word in draw.choice(OTHER, draw.integers(1, 13))]
        place = int(draw.integers(len(words) + 1))
        words.insert(place, str(draw.choice((BAD, GOOD)[label])))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_reviews(folder: Path, train: int = 60, test: int = 20) -> Path:
    checkpoints.write_split(folder, "train", reviews(train))
    checkpoints.write_split(folder, "validation", reviews(test, seed=1))
    return folder


def text_config(model: Path | str, dataset: Path, /, **changes: Any) -> RunConfig:
    """Return a configuration of text classification that suits the tiny models."""
    usual = {
        "task": "text-classification",
        "model": str(model),
        "dataset": str(dataset),
        "max-length": 32,
        "partitioner": "iid",
        "min-records": 1,
        "num-clients": 3,
        "rank": 3,
        "device": "cpu",
        "reproducible": True,
    }
    return RunConfig.of(usual, {key.replace("_", "-"): value for key, value in changes.items()})


def make_checkpoint(kind: str, folder: Path) -> Path:
    """Save a tiny model without a head, without dropout, and its tokenizer."""
    others: dict[str, Callable[[int], Any]] = {
        "distilbert": _distilbert,
        "albert": _albert,
        "modernbert": _modernbert,
    }
    if kind not in others:
        made: Path = getattr(checkpoints, kind)(folder, ALL)
    else:
        made = checkpoints.bert(folder, ALL)
        words = json.loads((made / "config.json").read_text())["vocab_size"]
        with torch.random.fork_rng():
            torch.manual_seed(6)
            others[kind](words).save_pretrained(made)
    set_in_config(made, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    set_in_config(made, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return made


def set_in_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def fill(adapted: AdaptedModel) -> None:
    """Give all arrays random values: at the start, B is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(adapted.parameters):
            p = adapted.parameters[name]
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def plain_twin(task: DatasetTask, adapted: AdaptedModel, targets: str) -> PeftModel:
    """Return the same model and values as PEFT alone makes it."""
    config = LoraConfig(
        r=3,
        lora_alpha=8,
        target_modules=targets,
        modules_to_save=list(task.head),
        fan_in_fan_out="c_attn" in targets,
    )
    twin = get_peft_model(task.build_model(), config).eval()
    parameters = plain_parameters(twin)
    assert parameters.keys() == adapted.parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapted.parameters[name])
    return twin


def gradients_alone(
    task: DatasetTask, twin: PeftModel, records: Records, indices: Tensor
) -> dict[str, Tensor]:
    """Return each record's gradient by ordinary autograd, alone and without padding."""
    parameters = plain_parameters(twin)
    rows = []
    for index in indices:
        loss = task.losses(twin, records.batch(index.view(1))).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def state_digest(model: nn.Module) -> str:
    """Return a hash of all weights."""
    return _digest(model.state_dict())


def records_digest(records: Records) -> str:
    """Return a hash of all records."""
    return _digest(records.batch(torch.arange(len(records))))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _distilbert(words: int) -> DistilBertModel:
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=words,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


def _albert(words: int) -> AlbertModel:
    # Three layers of the very same weights.
    return AlbertModel(
        AlbertConfig(
            vocab_size=words,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


def _modernbert(words: int) -> ModernBertModel:
    return ModernBertModel(
        ModernBertConfig(
            vocab_size=words,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        )
    )
