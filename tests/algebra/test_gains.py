"""Estimates of what a round's updates gained, against sums over pairs and known quadratics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.algebra.gains import (
    Average,
    Estimate,
    Movement,
    across,
    movements,
    secant,
)
from fedlora_flwr.algebra.update_sums import UpdateSums

Array = NDArray[np.float64]


def movement(updates: Array, weights: Sequence[float] = ()) -> Movement:
    """Return the movement of one array from the clients' updates of it."""
    sums = UpdateSums({"x": np.zeros(updates.shape[1:])}, ["x"])
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        sums.add({"x": update}, weight)
    return movements(sums, ["x"])["x"]


def squared(updates: Array, weights: Array) -> tuple[float, float]:
    """Sum over all pairs of different clients, with their weights."""
    shares = weights / weights.sum()
    total = weight = variance = 0.0
    energies = [p * p * float(u @ u) for p, u in zip(shares, updates, strict=True)]
    for i, j in permutations(range(len(updates)), 2):
        total += shares[i] * shares[j] * float(updates[i] @ updates[j])
        weight += shares[i] * shares[j]
        variance += 2 * energies[i] * energies[j]
    variance += 4 * sum(energies) * max(total, 0.0)
    return total / weight, variance / updates.shape[1] / weight**2


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_square_is_the_mean_product_of_different_clients(clients: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates, weights = 1 + rng.normal(size=(clients, 12)), rng.uniform(0.1, 5, clients)
    found = movement(updates.reshape(clients, 3, 4), weights.tolist())
    value, variance = squared(updates, weights)
    assert found.square is not None
    assert found.square.value == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert found.square.variance == pytest.approx(variance, rel=1e-9)
    shares = weights / weights.sum()
    np.testing.assert_allclose(found.mean, (shares @ updates).reshape(3, 4), rtol=1e-5, atol=1e-6)
    assert found.noise == pytest.approx(float(shares**2 @ (updates**2).sum(axis=1)))


def test_the_error_follows_from_sigma_c_and_b_although_nobody_told_them() -> None:
    """Noise of known size, several σ: no bias, and the error that the closed form gives."""
    sigma, clip, batch, rate, steps, size = 0.9, 2.0, 64, 0.5, 10, 2000
    deviation = rate * math.sqrt(steps) * sigma * clip / batch
    factors = np.array([1.0, 1.0, 2.0, 0.5, 1.5])
    rng, clients = np.random.default_rng(0), len(factors)
    agreed = np.full(size, 0.3 * deviation)
    truth, squares, errors = float(agreed @ agreed), [], []
    for _ in range(600):
        drawn = factors[:, None] * deviation * rng.standard_normal((clients, size))
        found = movement(agreed + drawn).square
        assert found is not None
        squares.append(found.value)
        errors.append(math.sqrt(found.variance))
    v = (factors * deviation) ** 2
    crossed = 2 * size * sum(v[i] * v[j] for i, j in permutations(range(clients), 2))
    mixed = 4 * v.sum() * truth * (clients - 1) ** 2
    expected = math.sqrt(crossed + mixed) / (clients * (clients - 1))
    assert np.mean(squares) == pytest.approx(truth, abs=4 * expected / math.sqrt(600))
    assert np.std(squares) == pytest.approx(expected, rel=0.12)
    assert np.mean(errors) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e20])
def test_weights_of_any_scale_give_the_same(scale: float) -> None:
    rng = np.random.default_rng(3)
    uploads = [{"a": rng.normal(size=4)} for _ in range(3)]
    current = {"a": np.zeros(4)}
    weights = np.array([1.0, 2.0, 4.0])
    sums = UpdateSums.of(current, uploads, (scale * weights).tolist())
    (found,) = movements(sums, ["a"]).values()
    value, variance = squared(np.array([u["a"] for u in uploads]), weights)
    assert found.square is not None
    assert found.square.value == pytest.approx(value)
    assert found.square.variance == pytest.approx(variance)
    # One client that is all there is has nobody to be compared with.
    sums = UpdateSums.of(current, uploads, [1.0, 1e-12, 1e-12])
    (alone,) = movements(sums, ["a"]).values()
    assert alone.square is None


def test_two_rounds_of_a_single_client_have_no_noise_in_common() -> None:
    rng, values, errors = np.random.default_rng(1), [], []
    agreed = np.full(500, 0.2)
    for _ in range(800):
        rounds = []
        for _ in range(2):
            rounds.append(movement(agreed + rng.standard_normal((1, 500)), [3.0]))
            assert rounds[-1].square is None
        found = across(rounds[0], rounds[1])
        values.append(found.value)
        errors.append(math.sqrt(found.variance))
    assert np.mean(values) == pytest.approx(20.0, abs=4 * float(np.std(values)) / math.sqrt(800))
    assert np.mean(errors) == pytest.approx(float(np.std(values)), rel=0.12)


def test_equal_uploads_are_one_upload() -> None:
    rng = np.random.default_rng(2)
    one = {"a": rng.normal(size=5), "b": rng.normal(size=(2, 2))}
    other = {"a": one["a"].copy(), "b": one["b"] + np.eye(2)}
    current = {name: np.zeros_like(array) for name, array in one.items()}
    sums = UpdateSums.of(current, [one, dict(one), dict(one)], [1.0, 2.0, 3.0])
    masked = movements(sums, ["a", "b"])
    assert all(found.square is None for found in masked.values())
    np.testing.assert_allclose(masked["b"].mean, one["b"], rtol=1e-6)
    # One difference anywhere tells clients apart.
    apart = movements(UpdateSums.of(current, [one, other], [1.0, 1.0]), ["a", "b"])
    assert all(found.square is not None for found in apart.values())


# A quadratic of known curvature, trained by several clients under noise.

CLIENTS, SIZE = 6, 300
EIGENVALUES = np.linspace(1.0, 9.0, SIZE)


def two_rounds(noise: float, rate: float, steps: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """Return the mean decrease of the loss in the first round, and what is estimated of it.

    ``noise`` is the noise of a step in units of the gradient, norm by norm. All is divided by what
    the gradient at the start alone promises.
    """
    rng = np.random.default_rng(seed)
    minima = 0.2 * rng.normal(size=(CLIENTS, SIZE))
    start = np.ones(SIZE)
    gradient = EIGENVALUES * (start - minima.mean(axis=0))
    deviation = noise * np.linalg.norm(gradient) / math.sqrt(SIZE)

    def loss(at: Array) -> float:
        return float(0.5 * (EIGENVALUES * (at - minima) ** 2).sum() / CLIENTS)

    fallen, along, bent = [], [], []
    for _ in range(draws):
        theta, rounds = start, list[Movement]()
        for _ in range(2):
            paths = np.repeat(theta[None], CLIENTS, axis=0)
            for _ in range(steps):
                drawn = deviation * rng.standard_normal(paths.shape)
                paths = paths - rate * (EIGENVALUES * (paths - minima) + drawn)
            rounds.append(movement(paths - theta))
            theta = theta + rounds[-1].mean
            if len(rounds) == 1:
                fallen.append(loss(start) - loss(theta))
        assert rounds[0].square is not None
        along.append(rounds[0].square.value / (rate * steps))
        bent.append(secant(rounds[0], rounds[1], steps).value / (rate * steps))
    first = rate * steps * float(gradient @ gradient)
    return {
        "true": np.array(fallen) / first,
        "along": np.array(along) / first,
        "net": (np.array(along) - np.array(bent)) / first,
    }


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.01, 1), (0.002, 10)])
def test_the_net_gain_is_the_decrease_of_the_loss_at_any_noise(
    noise: float, rate: float, steps: int
) -> None:
    draws = 300
    found = two_rounds(noise, rate, steps, draws)
    error = np.std(found["net"] - found["true"]) / math.sqrt(draws)
    # 0.02 is what terms of third order leave: (rate · steps · curvature)² is about 0.01.
    assert abs(found["net"].mean() - found["true"].mean()) < 0.02 + 4 * error
    # Looking twice costs nothing: the second look has noise of its own.
    assert noise < 1 or found["net"].std() < found["along"].std()


def test_without_the_second_look_noise_costs_nothing_and_that_is_wrong() -> None:
    found = two_rounds(10.0, 0.02, 1, 300)
    error = found["along"].std() / math.sqrt(300)
    assert found["true"].mean() < 0.4
    assert found["along"].mean() > 0.8 - 4 * error
    assert found["net"].mean() == pytest.approx(found["true"].mean(), abs=0.05 + 4 * error)


def test_without_noise_the_secant_is_the_curvature() -> None:
    """One step, one eigenvalue h: the decrease is 1 - h/2 of the promise, for any clients."""
    for h in (0.02, 0.1):
        # Updates that are the same to the last bit would count as one.
        clients = 1 + 1e-9 * np.arange(12.0).reshape(3, 4)
        rounds = [movement(-scale * clients) for scale in (1.0, 1.0 - h)]
        assert rounds[0].square is not None
        net = rounds[0].square - secant(rounds[0], rounds[1], 1)
        assert net.value / 4 == pytest.approx(1 - h / 2, rel=1e-6)


# Averages.


def test_a_mean_forgets_and_grows_unsure_with_age() -> None:
    found = Average()
    assert found.mean is None
    assert found.at(9, 0.5) is None
    found.add(Estimate(4.0, 1.0), 1, 0.5)
    assert found.at(2, 0.5) == Estimate(4.0, 1.0)
    found.add(Estimate(1.0, 1.0), 2, 0.5)
    now = found.at(3, 0.5)
    assert now is not None
    assert now.value == pytest.approx((0.5 * 4 + 1) / 1.5)
    assert now.variance == pytest.approx((0.25 + 1) / 1.5**2)
    later = found.at(6, 0.5)
    assert later is not None
    assert later.value == now.value
    assert later.variance == pytest.approx(8 * now.variance)
    # What keeps nothing is worth nothing once a round has passed.
    found.add(Estimate(7.0, 1.0), 7, 0.0)
    assert found.at(8, 0.0) == Estimate(7.0, 1.0)
    assert found.at(9, 0.0) == Estimate(7.0, math.inf)
