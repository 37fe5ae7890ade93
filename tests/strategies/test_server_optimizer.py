"""The server's optimizer under real strategies: plans, weights, robust rules, saved runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from numpy.typing import NDArray

from fedlora_flwr.algebra.server_optimizer import ServerOptimizer
from fedlora_flwr.errors import FederationAborted, InvalidValue
from fedlora_flwr.strategies import FedLoRA, strategy_class
from fedlora_flwr.strategies.robust import Robust
from tests.strategies.resumed import assert_goes_on_bit_for_bit
from tests.strategies.tiny import (
    Arrays,
    Asked,
    Tiny,
    arrays_of,
    moved,
    record_of,
    reply_of,
    start_arrays,
)

LR, BETA_1, BETA_2, TAU, ROUNDS = 0.2, 0.7, 0.9, 0.1, 5
MEANS = {
    "rolora": "yogi", "ffa-lora": "adam", "la-lora": "yogi", "as-lora": "adam",
    "head-only": "momentum", "fedavg": "adam",
}  # fmt: skip
Vector = NDArray[np.float64]


def made(name: str, optimizer: str, **options: Any) -> FedLoRA:
    strategy = strategy_class(name)(**options)
    strategy.server_optimizer = ServerOptimizer(optimizer, LR, BETA_1, BETA_2, TAU)
    return strategy


def sized(asked: Asked) -> RecordDict:
    """Answer with a number of records that differs between clients."""
    return reply_of(asked.trained(), asked.partition, weight=float(asked.partition + 1))


class Reference:
    """The paper's equations for whole arrays, fed with the clients' uploads."""

    def __init__(self, optimizer: str) -> None:
        self._optimizer = optimizer
        self._m: dict[str, Vector] = {}
        self._v: dict[str, Vector] = {}

    def after(self, x: Arrays, uploads: list[Arrays], shares: list[float]) -> dict[str, Vector]:
        found: dict[str, Any] = {name: array.astype(np.float64) for name, array in x.items()}
        for name in uploads[0]:
            mean = np.average([u[name] for u in uploads], axis=0, weights=shares)
            mean = mean.astype(np.float32).astype(np.float64)
            delta: Any = mean - x[name]
            m, v = self._m.get(name, 0 * delta), self._v.get(name, TAU**2 + 0 * delta)
            if self._optimizer == "momentum":
                self._m[name] = BETA_1 * m + delta
                found[name] += LR * self._m[name]
                continue
            self._m[name] = BETA_1 * m + (1 - BETA_1) * delta
            part = (1 - BETA_2) * delta**2
            yogi = np.where(v > delta**2, v - part, v + part)
            self._v[name] = BETA_2 * v + part if self._optimizer == "adam" else yogi
            found[name] += LR * self._m[name] / (np.sqrt(self._v[name]) + TAU)
        return found


def states(tiny: Tiny, final: Arrays) -> list[Arrays]:
    return [*(tiny.received(number) for number in range(1, ROUNDS + 1)), final]


@pytest.mark.parametrize(("name", "optimizer"), [*MEANS.items(), ("rolora", "momentum")])
def test_a_run_is_the_papers_run_and_what_rests_keeps_its_bits(name: str, optimizer: str) -> None:
    tiny, plain = Tiny(3, sized), Tiny(3, sized)
    strategy = made(name, optimizer, weighting="size")
    final = arrays_of(tiny.run(strategy, ROUNDS).arrays)
    reference, models = Reference(optimizer), states(tiny, final)
    for number in range(ROUNDS):
        told = [a for a in tiny.asked if a.server_round == number + 1]
        uploads = [asked.trained() for asked in told]
        shares = [float(asked.partition + 1) for asked in told]
        expected = reference.after(models[number], uploads, shares)
        for array in expected:
            np.testing.assert_allclose(models[number + 1][array], expected[array], atol=2e-6)
    # Exactly what trained has moved.
    trained = [
        set(next(a for a in tiny.asked if a.server_round == r + 1).trained()) for r in range(ROUNDS)
    ]
    assert moved(tiny, final, ROUNDS) == trained
    plain.run(strategy_class(name)(weighting="size"), ROUNDS)
    assert tiny.received(1)["head.bias"].tobytes() == plain.received(1)["head.bias"].tobytes()
    assert tiny.received(2)["head.bias"].tobytes() != plain.received(2)["head.bias"].tobytes()


@pytest.mark.parametrize(
    ("optimizer", "name", "own"),
    [
        ("momentum", "fedavgm", {"server_learning_rate": LR, "server_momentum": BETA_1}),
        # Flower begins with v = 0; a small τ makes the beginnings alike.
        ("yogi", "fedyogi", {"eta": LR, "beta_1": BETA_1, "beta_2": BETA_2, "tau": 1e-6}),
    ],
)
def test_flowers_own_optimizers_agree(optimizer: str, name: str, own: dict[str, Any]) -> None:
    strategy = FedLoRA()
    tau = own.get("tau", TAU)
    strategy.server_optimizer = ServerOptimizer(optimizer, LR, BETA_1, BETA_2, tau)
    ours = arrays_of(Tiny(3).run(strategy, 4).arrays)
    theirs = arrays_of(Tiny(3).run(strategy_class(name)(**own), 4).arrays)
    for array in ours:
        np.testing.assert_allclose(ours[array], theirs[array], rtol=1e-4, atol=1e-4)


def test_it_moves_the_model_by_what_a_robust_rule_returns() -> None:
    def one_lies(asked: Asked) -> RecordDict:
        arrays = asked.trained()
        if asked.partition == 0:
            arrays = {name: array + 50 for name, array in arrays.items()}
        return reply_of(arrays, asked.partition)

    tiny, strategy = Tiny(5, one_lies), made("rolora", "momentum")
    strategy.robust = Robust("median")
    tiny.run(strategy)
    start, final = tiny.received(1), arrays_of(strategy._result.arrays)
    uploads = [arrays_of(u.array_records["arrays"]) for u in tiny.uploads]
    for name in uploads[0]:
        middle = np.median([u[name].astype(np.float64) for u in uploads], axis=0)
        expected = start[name] + LR * (middle - start[name])
        np.testing.assert_allclose(final[name], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("rolora", "adam"), ("as-lora", "yogi"), ("fedavg", "momentum")]
)
def test_a_saved_run_goes_on_bit_for_bit(name: str, optimizer: str) -> None:
    assert_goes_on_bit_for_bit(lambda **options: made(name, optimizer, **options))


def test_a_new_run_of_the_same_object_starts_without_a_state() -> None:
    strategy = made("ffa-lora", "adam")
    first, second = (arrays_of(Tiny(3).run(strategy, 2).arrays) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex-lora", "fedsvd", "fedsa-lora"])
def test_other_aggregation_is_refused_before_a_client_is_asked(name: str) -> None:
    tiny = Tiny(3)
    with pytest.raises(InvalidValue, match=r"server-optimizer = 'adam'.*'none': "):
        tiny.run(made(name, "adam"))
    assert not tiny.asked


def test_heads_that_stay_with_clients_are_refused() -> None:
    with pytest.raises(InvalidValue, match="each client keeps its head"):
        Tiny(3).run(made("rolora", "adam", share_head=False))


def test_flowers_wrapper_whose_noise_is_made_for_a_mean_is_refused() -> None:
    wrapped = DifferentialPrivacyClientSideFixedClipping(made("dp-lora", "momentum"), 0.0, 0.5, 3)
    with Tiny(3).grid() as grid, pytest.raises(FederationAborted, match="the mean of uploads"):
        wrapped.start(grid, record_of(start_arrays()), 1)
