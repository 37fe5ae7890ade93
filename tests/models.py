"""Tiny random models of every supported family, each with records, a loss and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise

CLASSES = 5
MODES = {"A": ("A", None), "B": ("B", None), "*": ("A", "B", None)}
PLAIN_SGD = OptimizerSettings("sgd", lr_a=1.0, lr_b=1.0, lr_head=1.0)


@dataclass(frozen=True)
class Family:
    """How to build one kind of model and what to feed it."""

    name: str
    build: Callable[[], Any]
    records: Callable[[int], TensorRecords]
    losses: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    targets: str
    head: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """Return the same random fp64 model at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model: nn.Module = self.build()
        return model.double()

    def spec(self, dropout: float = 0.0) -> LoRASpec:
        return LoRASpec(3, 6.0, dropout, self.targets, self.head)

    def adapted(self, dropout: float = 0.0) -> AdaptedModel:
        """Return a model with the library's adapters, B at random."""
        adapted = attach(self.model(), self.spec(dropout), seed=1)
        _fill(adapted.parameters)
        return adapted

    def plain(self, dropout: float = 0.0) -> PeftModel:
        """Return an independent copy, of the same values, that only PEFT has touched."""
        spec = self.spec(dropout)
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=6,
            lora_dropout=dropout,
            target_modules=spec.targets,
            modules_to_save=list(spec.head) or None,
        )
        model = get_peft_model(self.model(), config)
        _fill(plain_parameters(model))
        return model.eval()


def plain_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return what PEFT trains, by the names that the library documents."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".default.weight", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _fill(parameters: Mapping[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name in sorted(parameters):
            p = parameters[name]
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def active(adapted: AdaptedModel, mode: str) -> tuple[str, ...]:
    """Return the names that train in a mode: the head and A, B or both."""
    return tuple(name for name in adapted.parameters if factor_of(name) in MODES[mode])


def loop_gradients(
    family: Family,
    plain: PeftModel,
    records: TensorRecords,
    indices: Iterable[int],
) -> dict[str, Tensor]:
    """Return each record's gradient by ordinary autograd, one record at a time."""
    parameters = plain_parameters(plain)
    rows: list[Sequence[Tensor]] = []
    for index in indices:
        loss = family.losses(plain, records.batch(torch.tensor([index]))).sum()
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def engine_of(family: Family, dropout: float = 0.0, microbatch: int | None = None) -> PrivateEngine:
    return PrivateEngine(family.adapted(dropout), family.losses, microbatch)


def values(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Return a copy of the exchanged arrays in full precision."""
    return {name: p.detach().clone() for name, p in adapted.parameters.items()}


def update(
    engine: PrivateEngine,
    records: TensorRecords,
    indices: Sequence[int],
    mode: str,
    mechanism: Mechanism,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Take one plain gradient step of length 1; return b times it, and undo it."""
    before = values(engine.adapted)
    engine.start_round(mechanism, PLAIN_SGD, SeededNoise(seed))
    engine.step(records, torch.tensor(indices, dtype=torch.int64), active(engine.adapted, mode))
    moved = {
        name: (before[name] - p.detach()) * mechanism.batch_size
        for name, p in engine.adapted.parameters.items()
    }
    with torch.no_grad():
        for name, p in engine.adapted.parameters.items():
            p.copy_(before[name])
    return moved


def joint_norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def pictures(count: int, size: int = 8) -> TensorRecords:
    generator = torch.Generator().manual_seed(3)
    return TensorRecords(
        {
            "image": torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64),
            "label": torch.randint(0, CLASSES, (count,), generator=generator),
        }
    )


def picture_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def _sentences(count: int) -> TensorRecords:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 40, (count, 7), generator=generator)
    lengths = torch.randint(3, 8, (count, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    return TensorRecords(
        {
            "input_ids": tokens * mask + (1 - mask),  # 1 is the padding token
            "attention_mask": mask,
            "label": torch.randint(0, CLASSES, (count,), generator=generator),
        }
    )


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _sentence_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**_inputs(batch)).logits, batch["label"], reduction="none")


def _token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits, mask = model(**_inputs(batch)).logits[:, :-1], batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def _vit() -> Any:
    return VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=8, depth=2, num_heads=2
    )


def _swin() -> Any:
    # 8x8 patches in windows of 4x4: four windows an image, the second block's shifted.
    return SwinTransformer(
        img_size=16,
        patch_size=2,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0.0,
    )


def _roberta() -> Any:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=20,
        )
    )


VIT = Family(
    "vit",
    _vit,
    pictures,
    picture_losses,
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc1)",
    ("head",),
)
SWIN = Family(
    "swin",
    _swin,
    lambda count: pictures(count, 16),
    picture_losses,
    r"layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
    ("head.fc",),
)
ROBERTA = Family(
    "roberta", _roberta, _sentences, _sentence_losses, r".*\.(query|value)", ("classifier",)
)
LLAMA = Family(
    "llama", _llama, _sentences, _token_losses, r".*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
)
FAMILIES = (VIT, SWIN, ROBERTA, LLAMA)
