"""The noise that rounds put into the product B A, by formula and through the real private step.

A library of `benchmarks.mechanisms`, without a command of its own. A step with an empty batch is
noise alone. So clients take the real steps of a method's plans on empty batches, the method
averages their uploads, and what the rounds have added to B A is noise.

With N clients, K steps, rate η and v₁ = (ησC/b)², the mean of the factor that all steps train has
the variance v = K v₁ / N per coordinate. For B of shape (m, r), A of shape (r, n) and variances v_B
and v_A of their noise, the expected squared norm of the noise in the product is
``m v_B ‖A‖² + n v_A ‖B‖² + m n r v_A v_B``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora_flwr.algebra.factors import refactorize
from fedlora_flwr.data.records import TensorRecords
from fedlora_flwr.layout import Layout, folded_names
from fedlora_flwr.lora.adapters import AdaptedModel, LoRASpec, attach
from fedlora_flwr.privacy.engine import PrivateEngine
from fedlora_flwr.privacy.mechanism import Mechanism
from fedlora_flwr.privacy.noise import SeededNoise
from fedlora_flwr.privacy.postprocessing.filters import make_filter
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings
from fedlora_flwr.randomness import stream_seed
from fedlora_flwr.strategies import Upload, strategy_class

Row: TypeAlias = dict[str, Any]
Arrays: TypeAlias = dict[str, NDArray[np.floating]]

WIDTH, HEIGHT, RANK = 16, 24, 2
CLIENTS, STEPS = 3, 4
SIGMA, CLIP, BATCH, RATE = 4.0, 1.0, 8, 0.5
VARIANCE = (RATE * SIGMA * CLIP / BATCH) ** 2
"""v₁: variance of what one step adds to a coordinate."""
ROUNDS = 2
METHODS: Mapping[str, tuple[str, str]] = {
    "dp-lora": ("dp-lora", "none"),
    "ffa-lora": ("ffa-lora", "none"),
    "rolora": ("rolora", "none"),
    "as-lora": ("as-lora", "none"),
    "la-lora": ("la-lora", "none"),
    "la-lora, binomial filter": ("la-lora", "binomial"),
    "fedex-lora": ("fedex-lora", "none"),
    "fedsvd": ("fedsvd", "none"),
}
"""For each row, the strategy and the filter."""
STARTS = ("B = 0", "B ≠ 0")


@dataclass(frozen=True)
class Size:
    """How many draws are made for each method and start."""

    draws: int = 250


QUICK = Size(20)


def measure(size: Size) -> Iterator[Row]:
    """Yield a row for each method, start and number of rounds."""
    for start in STARTS:
        for name, (strategy, smoothing) in METHODS.items():
            scene = _Scene(strategy, smoothing, start)
            drawn = np.array([scene.sample(seed) for seed in range(size.draws)])
            for rounds in range(1, ROUNDS + 1):
                squares = drawn[:, rounds - 1]
                yield {
                    "method": name,
                    "start": start,
                    "rounds": rounds,
                    "formula": scene.formula(rounds),
                    "sampled": float(squares.mean()),
                    "error": float(squares.std(ddof=1)) / math.sqrt(len(squares)),
                }


class _Scene:
    """One layer and one method."""

    def __init__(self, strategy: str, smoothing: str, start: str) -> None:
        self._name, self._smoothing = strategy, smoothing
        torch.manual_seed(0)
        spec = LoRASpec(rank=RANK, alpha=float(RANK), dropout=0.0, targets="0")
        net = nn.Sequential(nn.Linear(WIDTH, HEIGHT))
        self._adapted: AdaptedModel = attach(net, spec, seed=1)
        self._engine = PrivateEngine(self._adapted, lambda m, batch: m(batch["x"]).square().sum(1))
        self._layout = Layout.of(self._adapted.parameters, ".+")
        self._b, self._a = self._layout.pair(self._layout.layers[0])
        generator = np.random.default_rng(2)
        self._records = TensorRecords({"x": torch.from_numpy(
            generator.standard_normal((BATCH, WIDTH)).astype(np.float32)
        )})  # fmt: skip
        self._start: Arrays = dict(self._adapted.read())
        if start != STARTS[0]:
            drawn = 0.3 * generator.standard_normal((HEIGHT, RANK))
            self._start[self._b] = drawn.astype(np.float32)
        if strategy == "fedsvd":  # From its second round on, the rows of A are orthonormal.
            b, a = refactorize(self._start[self._b], self._start[self._a])
            self._start |= {self._b: b.astype(np.float32), self._a: a.astype(np.float32)}

    def sample(self, seed: int) -> list[float]:
        """Return the squared norm of the noise in the product after each round."""
        strategy = strategy_class(self._name)(local_steps=STEPS, blocks=".+")
        strategy.num_rounds = ROUNDS
        arrays, found = dict(self._start), []
        before = self._product(arrays)
        for number in range(1, ROUNDS + 1):
            plan = strategy.plan(number, self._layout)
            active = [self._layout.active(plan, step) for step in range(1, STEPS + 1)]
            trained = self._layout.trained(plan, STEPS)
            uploads = []
            for client in range(CLIENTS):
                self._adapted.write(arrays)
                noise = SeededNoise(stream_seed(seed, "noise", number, client))
                self._noise_alone(active, noise)
                uploads.append(Upload(f"client {client}", self._adapted.read(trained), 1.0, {}))
            arrays = dict(strategy.aggregate(number, arrays, uploads))
            found.append(float(np.square(self._product(arrays) - before).sum()))
        return found

    def _noise_alone(self, active: list[tuple[str, ...]], noise: SeededNoise) -> None:
        mechanism = Mechanism(SIGMA, CLIP, BATCH, BATCH)
        settings = OptimizerSettings("sgd", RATE, RATE, RATE)
        self._engine.start_round(mechanism, settings, noise, make_filter(self._smoothing))
        with self._engine.training():
            for names in active:
                self._engine.step(self._records, torch.tensor([], dtype=torch.int64), names)

    def _product(self, arrays: Arrays) -> NDArray[np.float64]:
        pairs = [(self._b, self._a), folded_names(self._layout.layers[0])]
        there = [(b, a) for b, a in pairs if b in arrays]
        terms = [arrays[b].astype(np.float64) @ arrays[a].astype(np.float64) for b, a in there]
        return np.asarray(sum(terms), dtype=np.float64)

    def formula(self, rounds: int) -> float:
        """Return the expected squared norm after so many rounds, in closed form."""
        squares = [np.square(self._start[name].astype(np.float64)) for name in (self._b, self._a)]
        b, a = (float(square.sum()) for square in squares)
        if self._name == "fedex-lora":
            return _exact(rounds, b, a)
        if self._name == "fedsvd":  # The rows of A are orthonormal in each round.
            a = float(RANK)
        return _averaged(*noisy_steps(self._name, rounds), b, a, self._smoothing)


def noisy_steps(strategy: str, rounds: int) -> tuple[int, int]:
    """Return how many steps add noise to B, and to A, in so many rounds."""
    if strategy in ("rolora", "as-lora"):  # In round 2 AS-LoRA takes A, which has no score yet.
        return math.ceil(rounds / 2) * STEPS, math.floor(rounds / 2) * STEPS
    if strategy == "la-lora":
        return rounds * math.ceil(STEPS / 2), rounds * math.floor(STEPS / 2)
    return rounds * STEPS, rounds * STEPS if strategy == "dp-lora" else 0


def _averaged(steps_b: int, steps_a: int, b: float, a: float, smoothing: str) -> float:
    """Return the noise where each factor is averaged after so many noisy steps of each."""
    high, low = (kept(size, smoothing) for size in (HEIGHT, WIDTH))
    v_b, v_a = steps_b * VARIANCE / CLIENTS, steps_a * VARIANCE / CLIENTS
    return high * v_b * a + low * v_a * b + high * low * RANK * v_a * v_b


def kept(size: int, smoothing: str) -> float:
    """Return the summed variance that a filter leaves of ``size`` coordinates of white noise.

    The binomial kernel is (1, 4, 6, 4, 1)/16, with the edges mirrored.
    """
    if smoothing == "none":
        return float(size)
    kernel = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    rows = [
        np.convolve(np.pad(one, 2, mode="symmetric"), kernel, mode="valid") for one in np.eye(size)
    ]
    return float(np.square(rows).sum())


def _exact(rounds: int, b: float, a: float) -> float:
    """Return the noise of a mean of products whose factors continue from their means."""
    v = STEPS * VARIANCE / CLIENTS
    total = 0.0
    for number in range(rounds):
        # The factors have grown by the noise of the means of earlier rounds.
        total += HEIGHT * v * (a + number * RANK * WIDTH * v)
        total += WIDTH * v * (b + number * RANK * HEIGHT * v)
        total += HEIGHT * WIDTH * RANK * (STEPS * VARIANCE) ** 2 / CLIENTS
    return total
