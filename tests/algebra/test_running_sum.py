"""Sums in twice the digits, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora_flwr.algebra.running_sum import RunningSum

Array = NDArray[np.float64]


def added(rows: Array, scale: float = 1.0) -> Array:
    found = RunningSum(rows.shape[1])
    for row in rows:
        found.add(row, scale)
    return found.total


def uneven(count: int, size: int, seed: int) -> Array:
    """Draw fp32 numbers from 1e-8 to 1e6."""
    draw = np.random.default_rng(seed)
    sizes = 10.0 ** draw.integers(-8, 6, (count, size))
    return (draw.normal(size=(count, size)) * sizes).astype(np.float32).astype(np.float64)


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_fp32_numbers_of_very_different_sizes_have_one_sum_in_every_order(
    count: int, seed: int
) -> None:
    terms = uneven(count, 7, seed)
    exact = [float(sum(map(Fraction, column.tolist()))) for column in terms.T]
    assert added(terms).tolist() == exact
    assert added(np.random.default_rng(seed).permutation(terms)).tolist() == exact


def test_fp64_alone_depends_on_the_order() -> None:
    """So the test above can fail."""
    terms = uneven(50, 200, 0)
    assert (np.add.accumulate(terms)[-1] != np.add.accumulate(terms[::-1])[-1]).any()


@given(st.floats(-1e6, 1e6, allow_subnormal=False))
def test_a_scale_multiplies_each_term(scale: float) -> None:
    terms = np.random.default_rng(1).normal(size=(20, 5))
    exact = [math.fsum((column * scale).tolist()) for column in terms.T]
    assert added(terms, scale).tolist() == pytest.approx(exact, rel=1e-15, abs=0)


def test_long_vectors_are_added_as_a_whole() -> None:
    terms = np.random.default_rng(2).normal(size=(3, 20_001))
    np.testing.assert_array_equal(added(terms[:1]), terms[0])
    np.testing.assert_allclose(added(terms), terms.sum(axis=0), rtol=1e-14, atol=1e-15)
