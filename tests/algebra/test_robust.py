"""Robust means against a few lines of NumPy of their own."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora_flwr.algebra.robust import krum, median, squared_distances, trimmed_mean
from fedlora_flwr.errors import InvalidValue

Array = NDArray[np.float64]
EQUAL, UNEQUAL = [1.0] * 7, [1.0, 5.0, 2.0, 0.5, 3.0, 1.0, 9.0]


def stack_of(clients: int = 7) -> Array:
    return np.random.default_rng(clients).normal(size=(clients, 4, 3))


def by_hand(values: Array, weights: list[float], cut: int) -> float:
    pairs = sorted(zip(values.tolist(), weights, strict=True), key=lambda pair: pair[0])
    kept = pairs[cut : len(pairs) - cut]
    return float(sum(v * w for v, w in kept) / sum(w for _, w in kept))


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_trimmed_mean_is_the_weighted_mean_of_the_middle_values(
    weights: list[float], cut: int
) -> None:
    stack = stack_of()
    found = trimmed_mean(stack, weights, cut)
    expected = [[by_hand(stack[:, i, j], weights, cut) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("clients", [1, 2, 3, 6, 7])
def test_the_median_is_numpys_where_weights_are_equal(clients: int) -> None:
    stack = stack_of(clients)
    np.testing.assert_allclose(median(stack, [2.0] * clients), np.median(stack, axis=0))


def test_a_large_weight_does_not_own_the_median() -> None:
    stack = np.array([[0.0], [1.0], [2.0], [3.0], [1e6]])
    assert median(stack, [1.0, 1.0, 1.0, 1.0, 1e9]).tolist() == [2.0]
    # The mean of two middle values is weighted by their clients' weights.
    assert median(stack[:4], [1.0, 1.0, 3.0, 1.0]).tolist() == [pytest.approx(1.75)]


def test_equal_values_are_told_apart_by_their_place_alone() -> None:
    stack = np.array([[1.0], [1.0], [1.0], [2.0]])
    assert trimmed_mean(stack, [1.0, 4.0, 4.0, 4.0], 1).tolist() == [1.0]
    # The first of the equal ones is left out, so the last one's weight counts.
    assert trimmed_mean(stack[1:], [1.0, 3.0, 1.0], 0).tolist() == [pytest.approx(1.2)]
    assert trimmed_mean(np.array([[1.0], [1.0], [5.0], [9.0]]), [7.0, 1.0, 3.0, 1.0], 1) == 4.0


def test_bad_clients_cannot_leave_the_range_of_the_honest() -> None:
    honest = stack_of(5)
    for value in (1e6, -1e6):
        found = trimmed_mean(np.concatenate([honest, np.full((2, 4, 3), value)]), EQUAL, 2)
        assert (found <= honest.max(axis=0)).all()
        assert (found >= honest.min(axis=0)).all()


def scores_by_hand(rows: Array, bad: int) -> list[float]:
    found = []
    for i, row in enumerate(rows):
        gaps = sorted(float(np.sum((row - other) ** 2)) for j, other in enumerate(rows) if j != i)
        found.append(sum(gaps[: len(rows) - bad - 2]))
    return found


@pytest.mark.parametrize(("clients", "bad"), [(5, 1), (9, 3), (7, 2), (3, 0)])
def test_krum_keeps_those_with_the_nearest_neighbors(clients: int, bad: int) -> None:
    rows = np.random.default_rng(1).normal(size=(clients, 6))
    rows[:bad] += 40 * np.arange(1, bad + 1)[:, None]
    scores = scores_by_hand(rows, bad)
    expected = sorted(sorted(range(clients), key=scores.__getitem__)[: clients - bad])
    assert krum(squared_distances(list(rows)), bad) == expected
    assert not set(expected) & set(range(bad))


def test_krum_takes_the_first_of_equal_scores() -> None:
    assert krum(squared_distances([np.zeros(2)] * 5), 1) == [0, 1, 2, 3]


@pytest.mark.parametrize(("clients", "cut"), [(2, 1), (4, 2), (0, 0), (3, -1)])
def test_a_trimmed_mean_needs_something_to_keep(clients: int, cut: int) -> None:
    with pytest.raises(InvalidValue, match=f"cut = {cut} cannot be used"):
        trimmed_mean(np.zeros((clients, 2)), [1.0] * clients, cut)
    with pytest.raises(InvalidValue, match="one for each of 3 clients"):
        trimmed_mean(np.zeros((3, 2)), [1.0] * 2, 1)


def test_krum_needs_two_honest_neighbors_more_than_bad_clients() -> None:
    with pytest.raises(InvalidValue, match="clients = 4 cannot be used: expected at least 5"):
        krum(np.zeros((4, 4)), 1)
