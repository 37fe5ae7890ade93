"""Compares the private step with plain PEFT's step without privacy, and with that of Opacus."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.figures import Call, Figure, operators, peak_bytes, take_turns
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.privacy import clipping
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise

RANK, ALPHA = 8, 16.0
PHASES = {"A": ("A", None), "B": ("B", None), "AB": ("A", "B", None)}
SIGMA, CLIP = 1.0, 1.0


@dataclass(frozen=True)
class Bars:
    """Bars for a private step over a plain one: of time, by the adapted layers, and of memory."""

    narrow: float = 1.00
    all_linears: float = 0.90
    memory: float | None = 1.03

    def time(self, layers: str) -> float:
        """Return the bar for a choice of layers."""
        return self.all_linears if layers == ALL_LINEARS else self.narrow


ALL_LINEARS = "all linears"


@dataclass(frozen=True)
class Shape:
    """A model at full size, its input, and the layers that get adapters.

    Parameters
    ----------
    name : str
        Name in the table.
    build : callable
        Makes the model with random weights.
    batch : callable
        Makes n records.
    losses : callable
        Maps (model, batch) to losses, shape (n,).
    targets : Mapping[str, str]
        Patterns of adapted layers, by their names in the table.
    head : str
        The classifier's name.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    losses: Callable[[Any, Mapping[str, Tensor]], Tensor]
    targets: Mapping[str, str]
    head: str


def measure(
    shapes: Sequence[Shape],
    records: int,
    repetitions: int,
    device: torch.device,
    on_figure: Callable[[Figure], None],
    rivals: bool = True,
    bars: Bars | None = None,
) -> None:
    """Measure time and memory of a step for every shape, choice of layers and phase.

    Parameters
    ----------
    shapes : Sequence[Shape]
        Models.
    records : int
        Records in the batch, the same in every step.
    repetitions : int
        Number of turns over which medians are taken.
    device : torch.device
        Device of the models.
    on_figure : callable
        Called with each figure once it is measured.
    rivals : bool (default: True)
        Also measure Opacus' hooks and ghost clipping, on few layers with both factors training.
    bars : Bars, optional
        Bars for the figures; those of a CPU by default.
    """
    bars = bars or Bars()
    for shape in shapes:
        for layers, targets in shape.targets.items():
            bench = StepBench(shape, targets, records, device)
            for phase in PHASES:
                what = f"{shape.name}, b = {records}, {layers}, {phase}"
                limits = (bars.time(layers), bars.memory)
                # They take twice as long as all the rest, and are measured only for the report.
                compared = rivals and phase == "AB" and layers != ALL_LINEARS
                for figure in bench.figures(what, phase, limits, repetitions, compared):
                    on_figure(figure)


class StepBench:
    """Our engine and plain PEFT side by side: one model, one choice of layers, one batch.

    Parameters
    ----------
    shape : Shape
        The model.
    targets : str
        Pattern of the layers that get adapters.
    records : int
        Records in the batch.
    device : torch.device
        Device of both models.
    rank : int
        Rank of the adapters.
    """

    def __init__(
        self, shape: Shape, targets: str, records: int, device: torch.device, rank: int = RANK
    ) -> None:
        self.shape, self.targets, self.device, self.rank = shape, targets, device, rank
        batch = shape.batch(records)
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.records, self.indices = TensorRecords(batch), torch.arange(records)
        # Drawing random weights takes seconds, copying them does not.
        torch.manual_seed(0)
        self._drawn = shape.build().to(device)
        spec = LoRASpec(rank, ALPHA, 0.0, targets, (shape.head,))
        self.engine = PrivateEngine(attach(self._model(), spec, seed=0), shape.losses)
        self.engine.verify(self.records)
        settings = OptimizerSettings("sgd", 1e-3, 1e-3, 1e-3)
        mechanism = Mechanism(SIGMA, CLIP, records, 10 * records)
        self.engine.start_round(mechanism, settings, SeededNoise(0))

    @cached_property
    def plain(self) -> PeftModel:
        """The same model with adapters of plain PEFT."""
        return self._peft()

    def call(self, names: Sequence[str] = ()) -> Call:
        """Return our step of the named arrays, or of all if none is named."""
        active = names or list(self.engine.adapted.parameters)
        return partial(self.engine.step, self.records, self.indices, active)

    def figures(
        self,
        what: str,
        phase: str,
        limits: tuple[float | None, float | None],
        repetitions: int,
        rivals: bool,
    ) -> Iterator[Figure]:
        """Measure time and memory of one phase; ``limits`` are the bars for both."""
        names = [n for n in self.engine.adapted.parameters if factor_of(n) in PHASES[phase]]
        calls: dict[str, Call] = {
            "ours": self.call(names),
            "plain PEFT": plain_step(self.plain, phase, self.shape, self.batch),
        }
        failed: dict[str, str] = {}
        if rivals:
            for name, make in (("Opacus hooks", _hooks), ("Opacus ghost clipping", _ghost)):
                try:
                    call = make(self._peft(), phase, self.shape, self.batch)
                    call()
                except Exception as error:  # What a rival cannot do is a finding.
                    failed[name] = f"fails: {type(error).__name__}"
                else:
                    calls[name] = call
        with self.engine.training():
            seconds = take_turns(calls, repetitions)
            memory = {name: peak_bytes(call) / 1e6 for name, call in calls.items()}
            # To count takes as long as to time, and the phase with most to do says enough.
            counted = calls if phase == "AB" else {}
            # A CPU takes norms in pieces that fit its cache, and a GPU takes them at once.
            with patch.object(clipping, "_COLUMNS", sys.maxsize):
                launches = {name: float(operators(call)) for name, call in counted.items()}
        for name in [*list(calls)[1:], *failed]:
            is_bar = name == "plain PEFT"
            yield Figure(
                f"{what}: time", seconds["ours"], seconds.get(name), "s", name,
                limits[0] if is_bar else None, failed.get(name, ""),
            )  # fmt: skip
            yield Figure(
                f"{what}: peak memory", memory["ours"], memory.get(name), "MB", name,
                limits[1] if is_bar else None, failed.get(name, ""),
            )  # fmt: skip
            if launches:
                yield Figure(
                    f"{what}: operators", launches["ours"], launches.get(name), "", name,
                    None, failed.get(name, ""),
                )  # fmt: skip

    def _model(self) -> nn.Module:
        return deepcopy(self._drawn)

    def _peft(self) -> PeftModel:
        config = LoraConfig(
            r=self.rank,
            lora_alpha=int(ALPHA),
            target_modules=self.targets,
            modules_to_save=[self.shape.head],
        )
        return get_peft_model(self._model(), config)


def _choose(model: PeftModel, phase: str) -> list[nn.Parameter]:
    """Let a phase's factors and the head train, and return them."""
    chosen = []
    for name, parameter in model.named_parameters():
        factor = "A" if "lora_A" in name else "B" if "lora_B" in name else None
        trains = factor in PHASES[phase] and (factor is not None or "modules_to_save" in name)
        parameter.requires_grad_(trains)
        if trains:
            chosen.append(parameter)
    return chosen


def plain_step(
    model: PeftModel, phase: str, shape: Shape, batch: Mapping[str, Tensor]
) -> Callable[[], None]:
    """Return plain PEFT's step without privacy, in which a phase's factors and the head train."""
    optimizer = torch.optim.SGD(_choose(model.train(), phase), lr=1e-3)

    def step() -> None:
        shape.losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _hooks(
    model: PeftModel, phase: str, shape: Shape, batch: Mapping[str, Tensor]
) -> Callable[[], None]:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    inner = torch.optim.SGD(_choose(model, phase), lr=1e-3)
    wrapped = GradSampleModule(model.train(), loss_reduction="mean", strict=False)
    size = len(next(iter(batch.values())))
    optimizer = DPOptimizer(
        inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=size
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        shape.losses(wrapped, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ghost(
    model: PeftModel, phase: str, shape: Shape, batch: Mapping[str, Tensor]
) -> Callable[[], None]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import (
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    inner = torch.optim.SGD(_choose(model, phase), lr=1e-3)
    wrapped = GradSampleModuleFastGradientClipping(
        model.train(), loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    size = len(next(iter(batch.values())))
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=size
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = shape.losses(wrapped, batch)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
        optimizer.step()

    return step


def swin(name: str = "Swin-T", model: str = "swin_tiny_patch4_window7_224") -> Shape:
    """Return one of timm's Swin models on 224×224 pictures."""

    def build() -> nn.Module:
        import timm

        built: nn.Module = timm.create_model(model, pretrained=False, num_classes=100)
        return built

    def batch(count: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "image": torch.randn(count, 3, 224, 224, generator=generator),
            "label": torch.randint(0, 100, (count,), generator=generator),
        }

    def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")

    targets = {"qkv": r".*attn\.qkv", ALL_LINEARS: r"layers\..*(qkv|proj|fc1|fc2)"}
    return Shape(f"{name} 224", build, batch, losses, targets, "head.fc")


def roberta(name: str = "RoBERTa-base", **sizes: int) -> Shape:
    """Return a RoBERTa on 128 tokens, of the base size unless other sizes are given."""

    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_labels=2,
            **sizes,
        )
        model: nn.Module = RobertaForSequenceClassification(config)
        return model

    def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return F.cross_entropy(model(**inputs).logits, batch["label"], reduction="none")

    layers = r"roberta\.encoder\.layer\..*"
    targets = {"q,v": layers + "(query|value)", ALL_LINEARS: layers + "(query|key|value|dense)"}
    batch = partial(token_batch, tokens=128, vocabulary=50000)
    return Shape(f"{name} 128", build, batch, losses, targets, "classifier")


def token_batch(count: int, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Draw labeled records of the same number of tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(3, vocabulary, (count, tokens), generator=generator),
        "attention_mask": torch.ones(count, tokens, dtype=torch.int64),
        "label": torch.randint(0, 2, (count,), generator=generator),
    }
