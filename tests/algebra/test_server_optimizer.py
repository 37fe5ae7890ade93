"""The server's optimizer, against the paper's equations written out for one entry."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.algebra.server_optimizer import ServerOptimizer
from fedlora_flwr.errors import InvalidValue

LR, BETA_1, BETA_2, TAU = 0.3, 0.8, 0.95, 0.05
every_optimizer = pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])


def made(name: str) -> ServerOptimizer:
    return ServerOptimizer(name, LR, BETA_1, BETA_2, TAU)


def by_hand(name: str, start: float, means: list[float]) -> list[float]:
    """Return one entry of the model after each round, with numbers of Python alone."""
    x, m, v, found = start, 0.0, TAU**2, []
    for mean in means:
        delta = mean - x
        if name == "momentum":
            m = BETA_1 * m + delta
            x += LR * m
        else:
            m = BETA_1 * m + (1 - BETA_1) * delta
            if name == "adam":
                v = BETA_2 * v + (1 - BETA_2) * delta**2
            else:
                toward = 0.0 if v == delta**2 else math.copysign(1.0, v - delta**2)
                v -= (1 - BETA_2) * delta**2 * toward
            x += LR * m / (math.sqrt(v) + TAU)
        found.append(x)
    return found


@every_optimizer
@given(start=st.floats(-2, 2), means=st.lists(st.floats(-2, 2), min_size=1, max_size=6))
def test_each_entry_follows_the_equations(name: str, start: float, means: list[float]) -> None:
    server, x = made(name), {"w": np.array([[start, -start]])}
    for mean, expected in zip(means, by_hand(name, start, means), strict=True):
        x = {"w": server.step(x, {"w": np.array([[mean, -mean]])}, ["w"])["w"]}
        np.testing.assert_allclose(x["w"], [[expected, -expected]], rtol=1e-9, atol=1e-9)


@every_optimizer
def test_an_array_at_rest_keeps_its_bits_and_its_state(name: str) -> None:
    server, rng = made(name), np.random.default_rng(0)
    x = {key: rng.normal(size=3).astype(np.float32) for key in ("a", "b")}
    x = server.step(x, {"a": x["a"] + 1, "b": x["b"] - 1}, ["a", "b"])
    before = copy.deepcopy(server.state_dict())

    after = server.step(x, {**x, "a": x["a"] + 1}, ["a"])

    assert after["b"] is x["b"]
    for moment, arrays in server.state_dict().items():
        assert set(arrays) == set(before[moment])
        if arrays:
            assert arrays["b"].tobytes() == before[moment]["b"].tobytes()
            assert arrays["a"].tobytes() != before[moment]["a"].tobytes()


def test_no_optimizer_takes_the_mean_itself() -> None:
    mean = {"w": np.array([-0.0, 1e-30], np.float32)}
    server = ServerOptimizer()
    assert not server.steps
    assert server.step({"w": np.ones(2, np.float32)}, mean, ["w"])["w"] is mean["w"]
    assert server.state_dict() == {"first": {}, "second": {}}


def test_momentum_of_rate_one_that_forgets_at_once_is_the_mean() -> None:
    rng = np.random.default_rng(1)
    x, mean = ({"w": rng.normal(size=500).astype(np.float32)} for _ in range(2))
    server = ServerOptimizer("momentum", 1.0, 0.0)
    assert server.step(x, mean, ["w"])["w"].tobytes() == mean["w"].tobytes()


def test_a_rate_of_zero_is_the_usual_one() -> None:
    x, mean = {"w": np.zeros(1)}, {"w": np.ones(1)}
    usual, named = (ServerOptimizer("adam", rate).step(x, mean, ["w"]) for rate in (0.0, 0.01))
    assert usual["w"] == named["w"] > 0


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"name": "sgd"}, "server-optimizer"),
        ({"lr": -1.0}, "server-lr"),
        ({"lr": math.inf}, "server-lr"),
        ({"beta_1": 1.0}, "server-beta-1"),
        ({"beta_2": math.nan}, "server-beta-2"),
        ({"tau": 0.0}, "server-tau"),
    ],
)
def test_what_cannot_be_used_is_named(wrong: dict[str, float], key: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        ServerOptimizer(**wrong)  # type: ignore[arg-type]
    assert caught.value.key == key
