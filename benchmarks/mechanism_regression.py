"""The error of reconstructing known updates, by round, for schedules of A and B.

A library of `benchmarks.mechanisms`, without a command of its own. Six layers have to learn a
matrix of rank 2 each, W, from clients whose own matrices scatter around it. The loss of a client is
``½ Σ ‖B A - W_client‖²`` over the layers, so gradients are exact and the best loss is known. In
every other layer the start of A spans what W reads, and B alone can learn it. In the others A
starts elsewhere and has to move. Plans and means are those of the strategies themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.products import mean_error
from fedlora_flwr.layout import Layout
from fedlora_flwr.strategies import Upload, strategy_class
from fedlora_flwr.strategies.base import FedLoRA

Row: TypeAlias = dict[str, Any]
Array: TypeAlias = NDArray[np.float64]
Arrays: TypeAlias = dict[str, Array]

LAYERS, HEIGHT, WIDTH, RANK = 6, 14, 10, 2
CLIENTS, STEPS, RATE, SCATTER = 4, 5, 0.1, 2.0
EVERY = 5
"""There is a row for every so many rounds."""
SCHEDULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dp-lora": ("dp-lora", {}),
    "ffa-lora": ("ffa-lora", {}),
    "la-lora": ("la-lora", {}),
    "rolora": ("rolora", {}),
    "as-lora, one choice for all": ("as-lora", {"groups": "tied"}),
    "as-lora": ("as-lora", {}),
}
"""For each row, the strategy and its settings. The layers of RoLoRA are tied, too."""


@dataclass(frozen=True)
class Size:
    """How much is run.

    Parameters
    ----------
    seeds : int
        Number of seeds.
    rounds : int
        Rounds.
    noises : tuple[float, ...]
        Deviation of the noise that a step's gradient gets per coordinate.
    """

    seeds: int = 5
    rounds: int = 80
    noises: tuple[float, ...] = (0.0, 0.3)


QUICK = Size(1, 6, (0.0,))


def measure(size: Size) -> Iterator[Row]:
    """Yield a row for each noise, schedule, seed and every fifth round."""
    for noise in size.noises:
        for name, (strategy, settings) in SCHEDULES.items():
            for seed in range(1, size.seeds + 1):
                method = strategy_class(strategy)(
                    seed=seed,
                    blocks=r"blocks\.\d+",
                    local_steps=STEPS,
                    **settings,
                    **_rates(strategy),
                )
                method.num_rounds = size.rounds
                problem = _Problem(seed)
                for number, error, lost in problem.play(method, size.rounds, noise):
                    if number % EVERY:
                        continue
                    yield {
                        "schedule": name,
                        "noise": noise,
                        "seed": seed,
                        "round": number,
                        "error": error,
                        "mean_error": lost,
                    }


def _rates(strategy: str) -> Row:
    return {"lr_a": RATE, "lr_b": RATE} if strategy == "as-lora" else {}


class _Problem:
    """The clients' matrices, and the start."""

    def __init__(self, seed: int) -> None:
        self._rng = rng = np.random.default_rng(seed)
        names = [f"blocks.{i}.fc.lora_{f}.weight" for i in range(LAYERS) for f in "AB"]
        self._layout = Layout.of(names)
        self._pairs = [self._layout.pair(layer) for layer in self._layout.layers]
        self.arrays: Arrays = {}
        self._targets: list[Array] = []
        for number, (b, a) in enumerate(self._pairs):
            reads, elsewhere = np.split(_orthonormal(rng, WIDTH)[: 2 * RANK], 2)
            target = rng.standard_normal((HEIGHT, RANK)) @ reads
            # A start that is a little off what W reads, or nearly orthogonal to it.
            near = reads if number % 2 == 0 else elsewhere
            self.arrays[a] = near + 0.05 * rng.standard_normal((RANK, WIDTH))
            self.arrays[b] = np.zeros((HEIGHT, RANK))
            self._targets.append(target / np.linalg.norm(target) * 2)
        scattered = SCATTER * rng.standard_normal((CLIENTS, LAYERS, HEIGHT, WIDTH))
        self._own = scattered - scattered.mean(axis=0)
        self._own /= np.sqrt(HEIGHT * WIDTH)

    def play(
        self, method: FedLoRA, rounds: int, noise: float
    ) -> Iterator[tuple[int, float, float]]:
        """Yield each round, its relative error, and what averaging the factors has lost."""
        for number in range(1, rounds + 1):
            plan = method.plan(number, self._layout)
            trained = self._layout.trained(plan, STEPS)
            uploads = []
            for client in range(CLIENTS):
                arrays = dict(self.arrays)
                for step in range(1, STEPS + 1):
                    self._step(arrays, client, self._layout.active(plan, step), noise)
                sent = {name: arrays[name] for name in trained}
                uploads.append(Upload(f"client {client}", sent, 1.0, {}))
            sent_by_all = [upload.arrays for upload in uploads]
            lost = mean_error(self.arrays, sent_by_all, [1.0] * CLIENTS) or 0.0
            averaged = method.aggregate(number, self.arrays, uploads)
            self.arrays = {name: np.asarray(x, np.float64) for name, x in averaged.items()}
            yield number, self._error(), lost

    def _step(self, arrays: Arrays, client: int, active: tuple[str, ...], noise: float) -> None:
        moves: Arrays = {}
        for number, (b, a) in enumerate(self._pairs):
            wanted = self._targets[number] + self._own[client, number]
            off = arrays[b] @ arrays[a] - wanted
            for name, slope in ((b, off @ arrays[a].T), (a, arrays[b].T @ off)):
                if name in active:
                    moves[name] = slope + noise * self._rng.standard_normal(slope.shape)
        for name, move in moves.items():
            arrays[name] = arrays[name] - RATE * move

    def _error(self) -> float:
        pairs = zip(self._pairs, self._targets, strict=True)
        lost = sum(
            float(np.square(self.arrays[b] @ self.arrays[a] - w).sum()) for (b, a), w in pairs
        )
        return float(np.sqrt(lost / sum(float(np.square(w).sum()) for w in self._targets)))


def _orthonormal(rng: np.random.Generator, size: int) -> Array:
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(basis)
