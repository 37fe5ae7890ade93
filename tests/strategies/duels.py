"""Rounds of AS-LoRA on a loss whose gradient is known: linear in each factor of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora_flwr.algebra.gains import Estimate
from fedlora_flwr.layout import Layout, factor_of
from fedlora_flwr.plan import ComponentPlan
from fedlora_flwr.strategies import ASLoRA, Upload
from fedlora_flwr.strategies.choices import Scores

SHAPES = {"A": (2, 24), "B": (24, 2)}
SIZE = 48


@dataclass
class Duels:
    """As many independent choices as there are blocks.

    Parameters
    ----------
    squares : Callable
        From a round to the squared norms of the mean updates of A and B, without noise.
    noise : float
        Standard deviation of the noise in each coordinate of one client's update.
    """

    squares: Callable[[int], tuple[float, float]]
    noise: float
    blocks: int = 200
    clients: int = 3
    seed: int = 0
    plans: list[str] = field(default_factory=list)
    leads: list[list[float | None]] = field(default_factory=list)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(
            [f"blocks.{i}.fc.lora_{factor}.weight" for i in range(self.blocks) for factor in "AB"]
        )

    @property
    def error(self) -> float:
        """Standard deviation of one round's square, from noise alone and in closed form."""
        n = self.clients
        return float(np.sqrt(2 * SIZE / (n * (n - 1))) * self.noise**2)

    def run(self, rounds: int, **settings: Any) -> ASLoRA:
        strategy = ASLoRA(seed=self.seed, **settings)
        strategy.num_rounds = rounds
        rng, layout = np.random.default_rng(self.seed), self.layout
        current = {n: np.zeros(SHAPES[str(factor_of(n))], np.float32) for n in layout.names}
        for server_round in range(1, rounds + 1):
            plan = strategy.plan(server_round, layout)
            self.plans.append(str(plan))
            self.leads.append([choice.z for choice in strategy._choices])
            uploads = self.uploads(rng, server_round, plan)
            current = dict(strategy.aggregate(server_round, current, uploads))
            current = {name: np.zeros_like(array) for name, array in current.items()}
        return strategy

    def uploads(
        self, rng: np.random.Generator, server_round: int, plan: ComponentPlan
    ) -> list[Upload]:
        squares = dict(zip("AB", self.squares(server_round), strict=True))
        uploads, names = [], self.layout.trained(plan, 1)
        for client in range(self.clients):
            arrays: dict[str, NDArray[Any]] = {}
            for name in names:
                factor = str(factor_of(name))
                agreed = np.sqrt(squares[factor] / SIZE)
                drawn = self.noise * rng.standard_normal(SHAPES[factor])
                arrays[name] = (agreed + drawn).astype(np.float32)
            uploads.append(Upload(f"client-{client}", arrays, 1.0, {}))
        return uploads

    def shares(self, first: int = 0) -> NDArray[np.float64]:
        """Return the share of A in each block, from a round on."""
        table = np.array([[mode == "A" for mode in plan] for plan in self.plans[first:]])
        return np.asarray(table.mean(axis=0), np.float64)


def layout_of(blocks: int) -> Layout:
    return Layout.of(
        [f"blocks.{i}.fc.lora_{factor}.weight" for i in range(blocks) for factor in "AB"]
    )


def known(a: float, b: float, error: float = 1.0) -> Scores:
    """Return what a group has learned of its factors, as of round 0."""
    scores = Scores()
    scores.gains["A"].add(Estimate(a, error**2), 0, 0.9)
    scores.gains["B"].add(Estimate(b, error**2), 0, 0.9)
    return scores
