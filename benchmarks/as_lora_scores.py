"""AS-LoRA's scores for a known loss, and the choices that follow from them, as noise grows.

Run ``python -m benchmarks.as_lora_scores``. It prints three tables: a round's decrease of a
quadratic loss, the same for a small network on real digits, and the choices of 200 runs. Each
compares three scores: that of the published code (only the last local step, clamped at zero), one
that averages the squares of single steps and multiplies by a secant along the noisy path, and that
of this package.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedlora_flwr.algebra.gains import Movement, movements, secant
from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.strategies.choices import Scores, chance_of_a, lead

Array: TypeAlias = NDArray[np.float64]
Gradient: TypeAlias = Callable[[Array, np.random.Generator], Array]
Row: TypeAlias = dict[str, Any]

NOISES = (0.1, 1.0, 3.0, 10.0)
CLIENTS, STEPS = 6, 5
PUBLISHED, SINGLE, BETWEEN, NET = "published code", "single steps", "between clients", "net"
ESTIMATES = (PUBLISHED, SINGLE, BETWEEN, NET)


@dataclass(frozen=True)
class Problem:
    """A federated loss.

    Parameters
    ----------
    gradient : Callable
        From parameters of shape (clients, d) to the gradients that the clients' batches give.
    loss : Callable
        Mean loss of all clients' records at parameters of shape (d,).
    start : ndarray
        Parameters at the start of the round, (d,).
    norm : float
        Norm of the mean gradient at the start.
    """

    gradient: Gradient
    loss: Callable[[Array], float]
    start: Array
    norm: float


def measure(problem: Problem, rate: float, noise: float, draws: int) -> Row:
    """Return the round's true decrease and its estimates, relative to what the start promises.

    ``noise`` is the norm of a step's noise in units of the gradient's norm.
    """
    rng = np.random.default_rng(0)
    size = problem.start.size
    deviation = noise * problem.norm / math.sqrt(size)
    found: dict[str, list[float]] = {name: [] for name in ("true", "kappa", *ESTIMATES)}
    for _ in range(draws):
        theta, rounds = problem.start, list[Movement]()
        for _ in range(2):
            moved, gradients, paths = _round(problem, theta, rate, deviation, rng)
            rounds.append(moved)
            theta = theta + moved.mean
            if len(rounds) == 1:
                found["true"].append(problem.loss(problem.start) - problem.loss(theta))
                _old_scores(found, gradients, paths, rate, deviation**2)
        square = rounds[0].square
        assert square is not None
        found[BETWEEN].append(square.value / (rate * STEPS))
        bend = secant(rounds[0], rounds[1], STEPS).value
        found[NET].append((square.value - bend) / (rate * STEPS))
    first = rate * STEPS * problem.norm**2
    row: Row = {"noise": noise, "kappa": [np.mean(found["kappa"]), np.std(found["kappa"])]}
    for name in ("true", *ESTIMATES):
        values = np.array(found[name]) / first
        row[name] = [float(values.mean()), float(values.std())]
    row["kappa"] = [float(value) for value in row["kappa"]]
    return row


def _round(
    problem: Problem, theta: Array, rate: float, deviation: float, rng: np.random.Generator
) -> tuple[Movement, Array, Array]:
    at = np.repeat(theta[None], CLIENTS, axis=0)
    gradients, paths = [], []
    for _ in range(STEPS):
        noisy = problem.gradient(at, rng) + deviation * rng.standard_normal(at.shape)
        gradients.append(noisy)
        paths.append(at)
        at = at - rate * noisy
    return _movement(at - theta), np.array(gradients), np.array(paths)


def _movement(updates: Array) -> Movement:
    sums = UpdateSums({"x": np.zeros_like(updates[0])}, ["x"])
    for update in updates:
        sums.add({"x": update})
    return movements(sums, ["x"])["x"]


def _old_scores(
    found: dict[str, list[float]], gradients: Array, paths: Array, rate: float, variance: float
) -> None:
    size = gradients.shape[-1]
    energies = (gradients**2).sum(axis=-1) - size * variance
    found[PUBLISHED].append(rate * STEPS * float(np.maximum(energies[-1], 0).mean()))
    moved, changed = np.diff(paths, axis=0), np.diff(gradients, axis=0)
    numerator = (changed * moved).sum(axis=(0, 2)) - rate * size * variance * (STEPS - 1)
    kappa = numerator / (moved**2).sum(axis=(0, 2))
    found["kappa"].append(float(kappa.mean()))
    scores = energies.mean(axis=0) * (1 - 0.5 * rate * np.maximum(kappa, 0))
    found[SINGLE].append(rate * STEPS * float(scores.mean()))


def quadratic() -> Problem:
    """Make a loss ½(θ - mᵢ)ᵀH(θ - mᵢ) with eigenvalues from 1 to 9, whose mean is 5."""
    rng, size = np.random.default_rng(1), 400
    eigenvalues = np.linspace(1.0, 9.0, size)
    minima, start = 0.2 * rng.normal(size=(CLIENTS, size)), np.ones(size)
    mean = eigenvalues * (start - minima.mean(axis=0))
    return Problem(
        lambda at, _: eigenvalues * (at - minima),
        lambda at: float(0.5 * (eigenvalues * (at - minima) ** 2).sum() / CLIENTS),
        start,
        float(np.linalg.norm(mean)),
    )


class Network:
    """A perceptron on scikit-learn's digits with LoRA of rank 4 on both layers.

    Its frozen weights were trained on pictures that are shifted by a pixel, so they need adapting.
    """

    HIDDEN, RANK, BATCH = 48, 4, 32

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        torch.manual_seed(0)
        pictures, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))[: len(labels) // 6 * 6]
        self.x = torch.tensor(pictures[order] / 16, dtype=torch.float64).view(CLIENTS, -1, 64)
        self.y = torch.tensor(labels[order]).view(CLIENTS, -1)
        self.frozen = self._pretrained()
        shapes = [(self.RANK, 64), (self.RANK, self.HIDDEN)]
        self.a = [torch.randn(shape, dtype=torch.float64) / shape[1] ** 0.5 for shape in shapes]
        self.b = torch.zeros(self.RANK * (self.HIDDEN + 10), dtype=torch.float64)

    def _pretrained(self) -> list[Tensor]:
        x = self.x.view(-1, 8, 8).roll(1, 2).reshape(-1, 64)
        weights = [torch.randn(self.HIDDEN, 64) * 0.1, torch.randn(10, self.HIDDEN) * 0.1]
        weights = [weight.double().requires_grad_() for weight in weights]
        optimizer = torch.optim.Adam(weights, lr=0.01)
        for _ in range(60):
            logits = F.relu(x @ weights[0].T) @ weights[1].T
            loss = F.cross_entropy(logits, self.y.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return [weight.detach() for weight in weights]

    def losses(self, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return each client's mean loss at B of both layers, (clients, d)."""
        first, second = torch.split(b, [self.HIDDEN * self.RANK, 10 * self.RANK], dim=1)
        for number, (part, width) in enumerate(((first, self.HIDDEN), (second, 10))):
            low = (x @ self.a[number].T) @ part.view(len(b), width, self.RANK).mT
            x = x @ self.frozen[number].T + 2 * low
            x = F.relu(x) if number == 0 else x
        each = F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none")
        return each.view(len(b), -1).mean(dim=1)

    def gradient(self, at: Array, rng: np.random.Generator) -> Array:
        """Return the gradients of one batch of each client."""
        chosen = torch.from_numpy(rng.integers(self.x.shape[1], size=(CLIENTS, self.BATCH)))
        rows = torch.arange(CLIENTS)[:, None]
        b = torch.from_numpy(at).requires_grad_()
        total = self.losses(b, self.x[rows, chosen], self.y[rows, chosen]).sum()
        (found,) = torch.autograd.grad(total, b)
        return np.asarray(found.numpy())

    def problem(self) -> Problem:
        """Return the loss in B of both layers, from the start of training."""

        def loss(at: Array) -> float:
            b = torch.from_numpy(np.repeat(at[None], CLIENTS, axis=0))
            return float(self.losses(b, self.x, self.y).mean())

        b = self.b[None].repeat(CLIENTS, 1).requires_grad_()
        (found,) = torch.autograd.grad(self.losses(b, self.x, self.y).sum(), b)
        return Problem(self.gradient, loss, self.b.numpy(), float(found.mean(dim=0).norm()))


def choices(square: float, runs: int, rounds: int = 20) -> dict[str, Row]:
    """Return how often three rules choose A, and how many runs never leave one factor.

    A's squared gradient is ``square`` times the power of a single step's noise; B's is zero.
    """
    rng, size = np.random.default_rng(2), 512
    found = {}
    for name in (PUBLISHED, SINGLE, NET):
        table = np.array([_choose(name, np.sqrt(square), size, rounds, rng) for _ in range(runs)])
        alone = np.mean((table.mean(axis=1) == 0) | (table.mean(axis=1) == 1))
        found[name] = {"share of A": float(table.mean()), "one factor alone": float(alone)}
    return found


def _choose(rule: str, agreed: float, size: int, rounds: int, rng: np.random.Generator) -> Array:
    scores, averages = Scores(), dict[str, float]()
    chosen = []
    for t in range(1, rounds + 1):
        mode, warm = "BA"[t % 2 == 0], rounds // 10
        if t > warm and rule == NET:
            a, b = scores.before(t, 0.9, curved=False)
            assert a is not None
            assert b is not None
            drift = 0.2 * math.sqrt(scores.unseen(t))
            chance = chance_of_a(lead(a, b, drift), "sample", 1.0, 0.02)
            mode = "A" if rng.random() < chance else "B"
        elif t > warm:
            a_score, b_score = averages["A"], averages["B"]
            relative = (a_score - b_score) / (abs(a_score) + abs(b_score) + 1e-8)
            heat = max(0.1, 0.95 ** (t - warm))
            mode = "A" if rng.random() < 1 / (1 + math.exp(-relative / heat)) else "B"
        gradients = rng.standard_normal((CLIENTS, STEPS, size)) + agreed * (mode == "A")
        energies = (gradients**2).sum(axis=-1) - size
        if rule == NET:
            square = _movement(gradients.sum(axis=1)).square
            assert square is not None
            scores.gains[mode].add(square, t, 0.9)
        else:
            clamped = np.maximum(energies[:, -1], 0).mean() if rule == PUBLISHED else 0.0
            score = float(clamped if rule == PUBLISHED else max(energies.mean(), 0.0))
            averages[mode] = 0.9 * averages.get(mode, score) + 0.1 * score
        chosen += [float(mode == "A")] * (t > warm)
    return np.array(chosen)


def _table(title: str, rows: list[Row], columns: tuple[str, ...]) -> Table:
    table = Table(*("noise", *columns), title=title)
    for row in rows:
        table.add_row(
            f"{row['noise']:g}", *(f"{row[name][0]:.2f} ± {row[name][1]:.2f}" for name in columns)
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file if one is named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.as_lora_scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draws", type=int, default=400, help="draws of the noise (400)")
    parser.add_argument("--runs", type=int, default=200, help="runs of each choice (200)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: Row = {"clients": CLIENTS, "steps": STEPS, "draws": given.draws, "runs": given.runs}
    for name, problem, rate in (
        ("quadratic", quadratic(), 0.008),
        ("network", Network().problem(), 0.05),
    ):
        rows = [measure(problem, rate, noise, given.draws) for noise in NOISES]
        found[name] = {"rate": rate, "rows": rows}
        Console().print(_table(name, rows, ("true", *ESTIMATES, "kappa")))
    found["choices"] = {str(s): choices(s, given.runs) for s in (0.0, 0.001, 0.01, 0.03, 0.1)}
    Console().print_json(json.dumps(found["choices"]))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
