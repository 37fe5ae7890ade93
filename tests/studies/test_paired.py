"""Intervals of paired differences, against tables and against SciPy's own test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel  # type: ignore[import-untyped,unused-ignore]

from fedlora_flwr.studies.paired import Difference, figure, paired


def test_the_interval_is_that_of_a_printed_table() -> None:
    """By hand: gaps 1, 2, 3, 4, 5; s = 1.5811; t(4) at 97.5 % = 2.776 in any table."""
    one = {seed: 10.0 + seed for seed in range(1, 6)}
    found = paired(one, dict.fromkeys(one, 10.0))
    assert found is not None
    assert (found.mean, found.seeds) == (3.0, 5)
    half = 2.776 * 1.5811 / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-3)
    assert found.told_apart


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_what_is_told_apart_is_what_a_paired_test_rejects(
    values: list[tuple[float, float]],
) -> None:
    one, other = (dict(enumerate(column)) for column in zip(*values, strict=True))
    gaps = np.array([a - b for a, b in values])
    if np.ptp(gaps) < 1e-6:  # SciPy's test divides by the spread.
        return
    found = paired(one, other)
    assert found is not None
    p = ttest_rel(*zip(*values, strict=True)).pvalue
    if abs(p - 0.05) > 1e-6:
        assert found.told_apart == (p < 0.05)


def test_pairing_by_seed_sees_what_unpaired_spreads_hide() -> None:
    base = {1: 0.60, 2: 0.70, 3: 0.80}
    found = paired({1: 0.62, 2: 0.721, 3: 0.819}, base)
    assert found is not None
    assert found.told_apart
    shuffled = paired({1: 0.819, 2: 0.721, 3: 0.62}, base)
    assert shuffled is not None
    assert shuffled.mean == pytest.approx(found.mean)
    assert not shuffled.told_apart


def test_only_seeds_that_both_have_count() -> None:
    assert paired({1: 0.5}, {2: 0.5}) is None
    found = paired({1: 0.5, 2: 0.7}, {2: 0.6, 3: 0.1})
    assert found is not None
    assert found.seeds == 1
    assert math.isnan(found.low)
    assert not found.told_apart


@pytest.mark.parametrize(("gap", "expected"), [(0.0, Difference(0.0, 0.0, 0.0, 3)), (0.25, None)])
def test_equal_differences_have_no_spread_to_go_by(gap: float, expected: Difference | None) -> None:
    base = {1: 0.5, 2: 0.25, 3: 0.125}
    found = paired({seed: value + gap for seed, value in base.items()}, base)
    assert found is not None
    assert not found.told_apart
    if expected is None:
        assert (found.mean, math.isnan(found.low)) == (gap, True)
    else:
        assert found == expected


def test_a_figure_of_one_seed_has_no_spread() -> None:
    assert figure({}) is None
    one = figure({4: 0.5})
    assert one is not None
    assert (one.mean, math.isnan(one.std), one.seeds) == (0.5, True, 1)
