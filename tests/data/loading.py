"""Loads exported adapters with plain PEFT, in a process and with a seed of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from peft import PeftModel

from fedlora_flwr.backbones.language_models import MeanPooledClassifier


def backbone(case: dict[str, Any]) -> Any:
    """Return the checkpoint as anybody loads it; what it lacks is drawn."""
    kind, folder = case["kind"], case["model"]
    if kind == "image":
        return timm.create_model(
            f"local-dir:{folder}", pretrained=True, num_classes=3, img_size=case["size"]
        )
    if kind == "mean":
        return MeanPooledClassifier(transformers.AutoModel.from_pretrained(folder), 2)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    options = {} if kind == "CausalLM" else {"num_labels": 2}
    model = auto.from_pretrained(folder, **options)
    model.config.pad_token_id = case["padding"]
    return model


def predictions(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all scores of a model in one tensor."""
    with torch.no_grad():
        found = model(inputs["x"]) if "x" in inputs else model(**inputs)
    if isinstance(found, torch.Tensor):
        return found
    if "logits" in found:
        return torch.as_tensor(found.logits)
    return torch.as_tensor(found.start_logits + 2 * found.end_logits)


if __name__ == "__main__":
    torch.manual_seed(99)
    for place in map(Path, sys.argv[1:]):
        bare = backbone(json.loads((place / "case.json").read_text())).eval()
        inputs = torch.load(place / "inputs.pt")
        before = predictions(bare, inputs)
        loaded = PeftModel.from_pretrained(bare, str(place / "adapter")).eval()
        torch.save((before, predictions(loaded, inputs)), place / "found.pt")
