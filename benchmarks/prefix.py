"""What a step saves once the frozen first layers' activations of every record are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.figures import Call, Figure, take_turns
from benchmarks.step import Shape, roberta
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.layout import factor_of
from fedlora_flwr.lora.adapters import LoRASpec, attach
from fedlora_flwr.lora.prefix_cache import PrefixCache
from fedlora_flwr.privacy.engine import OptimizerSettings, PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise

# The adapted layers of the recipe `sst2-minilm`: value and all dense layers of the last three.
LATE = r".*layer\.[345]\..*(value|dense)"
BARS = {"last three layers": 1 / 1.35, "head alone": 1 / 10}
SGD = OptimizerSettings("sgd", lr_a=0.0, lr_b=0.0, lr_head=0.0)


@dataclass(frozen=True)
class Setting:
    """Size of the encoder and of a step."""

    layers: int = 6
    width: int = 384
    records: int = 64
    repetitions: int = 3

    @property
    def shape(self) -> Shape:
        """An encoder of MiniLM's size."""
        sizes = {
            "num_hidden_layers": self.layers, "hidden_size": self.width,
            "intermediate_size": 4 * self.width, "num_attention_heads": 12,
        }  # fmt: skip
        return roberta("MiniLM-size encoder", **sizes)


def measure(setting: Setting, on_figure: Callable[[Figure], None]) -> None:
    """Compare private steps with the cache and without it, on records that are all known."""
    calls: dict[str, Call] = {}
    for what in BARS:
        for cached in (True, False):
            calls[f"{what}, {cached}"] = step(setting, what, cached)
    seconds = take_turns(calls, setting.repetitions)
    for what, bar in BARS.items():
        name = f"{setting.shape.name}, b = {setting.records}, {what}"
        ours, without = seconds[f"{what}, True"], seconds[f"{what}, False"]
        on_figure(Figure(name, ours, without, "s", "the same step without the cache", bar))


def step(setting: Setting, what: str, cached: bool) -> Call:
    """Return a private step, after one that has seen all records."""
    shape = setting.shape
    spec = LoRASpec(4, 16.0, 0.0, LATE, (shape.head,), backbone_dropout=False)
    adapted = attach(shape.build(), spec, seed=0)
    names: Sequence[str] = [
        name for name in adapted.parameters if what != "head alone" or factor_of(name) is None
    ]
    if cached:
        PrefixCache(adapted, 2**30).follow(names)
    engine = PrivateEngine(adapted, shape.losses)
    records = TensorRecords(shape.batch(setting.records))
    engine.start_round(Mechanism(1.0, 1.0, setting.records, setting.records), SGD, SeededNoise(0))
    indices = torch.arange(setting.records)

    def call() -> None:
        with engine.training():
            engine.step(records, indices, names)

    call()
    return call
