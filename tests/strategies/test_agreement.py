"""Figures of a round against dense arithmetic on the products themselves."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora_flwr.algebra.update_sums import UpdateSums
from fedlora_flwr.strategies import FedLoRA, FedSALoRA, FFALoRA, FlexLoRA, RoLoRA
from fedlora_flwr.strategies.agreement import Agreement, describe
from fedlora_flwr.strategies.replies import Upload
from tests.strategies.tiny import Asked, Tiny, honest, reply_of

Arrays = dict[str, NDArray[np.float32]]
LAYERS = ("blocks.0.fc", "blocks.1.fc")


def arrays_of(draw: np.random.Generator, rank: int = 3, scale: float = 1.0) -> Arrays:
    found: dict[str, NDArray[np.float64]] = {}
    for layer, (m, n) in zip(LAYERS, ((30, 20), (12, 40)), strict=True):
        found[f"{layer}.lora_B.weight"] = draw.normal(size=(m, rank), scale=scale)
        found[f"{layer}.lora_A.weight"] = draw.normal(size=(rank, n), scale=scale)
    found["head.weight"] = draw.normal(size=(5, 7), scale=scale)
    return {name: array.astype(np.float32) for name, array in found.items()}


def uploads_of(
    count: int, seed: int = 0, names: str = "", weights: bool = True
) -> tuple[Arrays, list[Upload]]:
    draw = np.random.default_rng(seed)
    current, shared = arrays_of(draw), arrays_of(draw, scale=0.3)
    uploads = []
    for k in range(count):
        own = arrays_of(draw, scale=0.5)
        moved = {n: current[n] + shared[n] + own[n] for n in current if names in n}
        weight = float(draw.uniform(0.5, 3)) if weights else 1.0
        uploads.append(Upload(f"client-{k}", moved, weight, {}))
    return current, uploads


def dense(current: Arrays, uploads: list[Upload]) -> float:
    """Form every product, as the published definition reads."""
    shares = np.array([u.weight for u in uploads]) / sum(u.weight for u in uploads)
    lost = whole = 0.0
    for layer in LAYERS:
        b, a = f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"
        bs, avs = (
            np.stack([u.arrays.get(n, current[n]) for u in uploads]).astype(float) for n in (b, a)
        )
        products = np.einsum("k,kmr,krn->mn", shares, bs, avs)
        means = np.einsum("k,kmr->mr", shares, bs) @ np.einsum("k,krn->rn", shares, avs)
        lost += np.square(products - means).sum()
        whole += np.square(products).sum()
    return math.sqrt(lost / whole)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_the_error_of_the_mean_is_that_of_dense_products(count: int) -> None:
    current, uploads = uploads_of(count)
    lost = describe(current, uploads)["mean_error"]
    assert lost == pytest.approx(dense(current, uploads), rel=1e-9, abs=1e-12)


def test_many_clients_are_estimated_closely() -> None:
    current, uploads = uploads_of(200)
    lost = describe(current, uploads)["mean_error"]
    assert lost == pytest.approx(dense(current, uploads), rel=0.05)


@pytest.mark.parametrize("names", ["lora_A", "lora_B", "head"])
def test_one_factor_alone_is_averaged_exactly(names: str) -> None:
    assert describe(*uploads_of(4, names=names))["mean_error"] == 0.0
    assert describe(*uploads_of(200, names=names))["mean_error"] == 0.0


def test_products_of_zero_have_no_relative_error() -> None:
    current, uploads = uploads_of(3)
    zero = {n: np.zeros_like(a) if "lora_B" in n else a for n, a in current.items()}
    same = [Upload(u.client, {**u.arrays, **{n: zero[n] for n in zero if "lora_B" in n}}, 1.0, {})
            for u in uploads]  # fmt: skip
    assert describe(zero, same)["mean_error"] is None


def vectors(current: Arrays, uploads: list[Upload], part: str) -> NDArray[np.float64]:
    names = [n for n in current if (part in n if part != "head" else "lora" not in n)]
    return np.stack(
        [
            np.concatenate([(u.arrays[n].astype(float) - current[n]).ravel() for n in names])
            for u in uploads
        ]
    )


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "head"])
def test_agreement_is_the_mean_cosine_of_all_pairs(part: str) -> None:
    current, uploads = uploads_of(6)
    updates = vectors(current, uploads, part)
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in combinations(updates, 2)]
    found = describe(current, uploads)["agreement"]
    assert found[part.removeprefix("lora_")] == pytest.approx(np.mean(cosines), rel=1e-9)


def figures(current: Arrays, uploads: list[Upload]) -> Agreement:
    """Return what is said of the head."""
    sums = UpdateSums.of(current, [u.arrays for u in uploads], [u.weight for u in uploads])
    return Agreement.of(sums, "head")


@pytest.mark.parametrize("weights", [True, False])
def test_signal_and_spread_are_those_that_were_drawn(weights: bool) -> None:
    """Updates are one shared vector plus independent noise: both norms are known."""
    draw = np.random.default_rng(1)
    size, count = 20_000, 8
    current = {"head.weight": np.zeros(size, np.float32)}
    shared = draw.normal(size=size) * 0.02
    own = draw.normal(size=(count, size)) * 0.03
    chosen = draw.uniform(1, 3, count) if weights else np.ones(count)
    uploads = [
        Upload(f"client-{k}", {"head.weight": (shared + own[k]).astype(np.float32)}, float(w), {})
        for k, w in enumerate(chosen)
    ]
    found = figures(current, uploads)
    shares = chosen / chosen.sum()
    assert found.signal == pytest.approx(np.linalg.norm(shared), rel=0.02)
    assert found.spread == pytest.approx(np.linalg.norm(shares @ own), rel=0.02)
    mean = np.linalg.norm(shares @ (shared + own))
    assert math.hypot(found.signal, found.spread) == pytest.approx(mean, rel=1e-6)


def test_noise_alone_has_no_signal_that_is_negative() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        uploads = [
            Upload(f"client-{k}", {"head": draw.normal(size=50).astype(np.float32)}, 1.0, {})
            for k in range(3)
        ]
        found = figures({"head": np.zeros(50, np.float32)}, uploads)
        assert found.signal >= 0
        assert found.spread >= 0


def test_clients_that_did_not_move_have_no_cosine() -> None:
    current, _ = uploads_of(1)
    still = [Upload(f"client-{k}", dict(current), 1.0, {}) for k in range(3)]
    found = describe(current, still)
    assert found["agreement"] == dict.fromkeys(("A", "B", "head"))
    assert found["signal"] == found["spread"] == dict.fromkeys(("A", "B", "head"), 0.0)
    assert found["mean_error"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [(FedLoRA, "A B head"), (FFALoRA, "B head"), (RoLoRA, "B head"), (FedSALoRA, "A")],
)
def test_a_round_s_row_has_the_parts_that_were_uploaded(
    strategy: type[FedLoRA], parts: str
) -> None:
    def answer(asked: Asked):  # type: ignore[no-untyped-def]
        moved = asked.trained()
        kept = {n: a for n, a in moved.items() if strategy is not FedSALoRA or "lora_A" in n}
        return reply_of(kept, asked.partition)

    ran = strategy()
    Tiny(3, answer).run(ran)
    assert ran.last_round is not None
    compared = ran.last_round.compared
    assert list(compared["agreement"]) == parts.split()
    # Where B stays with the clients, nobody knows their products.
    assert ("mean_error" in compared) == (strategy is not FedSALoRA)


def test_clients_of_different_ranks_are_not_compared() -> None:
    current, uploads = uploads_of(2)
    smaller = Upload("client-9", arrays_of(np.random.default_rng(9), rank=2), 1.0, {})
    assert describe(current, [*uploads, smaller]) == {}
    strategy = FlexLoRA()
    Tiny(2, honest).run(strategy)
    assert strategy.last_round is not None
    assert "mean_error" in strategy.last_round.compared


def test_memory_does_not_grow_with_the_cohort() -> None:
    """A hundred clients may take no more than ten, beside the uploads themselves."""
    import tracemalloc

    def peak(count: int) -> int:
        draw = np.random.default_rng(0)
        current = {
            "blocks.0.fc.lora_B.weight": np.zeros((500, 8), np.float32),
            "blocks.0.fc.lora_A.weight": np.zeros((8, 300), np.float32),
            "head": np.zeros(20_000, np.float32),
        }
        uploads = [
            Upload(
                f"client-{k}",
                {n: draw.normal(size=a.shape).astype(np.float32) for n, a in current.items()},
                1.0,
                {},
            )
            for k in range(count)
        ]
        tracemalloc.start()
        describe(current, uploads)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(200) < 1.1 * peak(50)
