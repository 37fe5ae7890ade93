"""Numbers on axes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr.report.charts import runs_of
from fedlora_flwr.report.scales import duration, percent, plain, size, thinned, ticks

FINITE = st.floats(-1e9, 1e9)


@given(FINITE, st.floats(1e-6, 1e9))
def test_ticks_enclose_the_range_in_equal_steps(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) - min(steps) <= slack


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 8, [0, 2, 4, 6, 8]), (0.61, 0.84, [0.6, 0.65, 0.7, 0.75, 0.8, 0.85]), (0, 0, [0, 0.2])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_what_is_counted_are_whole() -> None:
    assert ticks(0, 2, 7, whole=True) == [0, 1, 2]
    assert ticks(1, 1, 7, whole=True) == [1, 2]
    assert all(value == int(value) for value in ticks(0, 13, 7, whole=True))


def test_items_are_thinned_evenly_and_keep_both_ends() -> None:
    assert thinned([1, 2, 3]) == [1, 2, 3]
    found = thinned([*range(1001)], 11)
    assert found == [*range(0, 1001, 100)]


def test_numbers_read_as_a_person_writes_them() -> None:
    assert [percent(v) for v in (0.8, 0.8027)] == ["80%", "80.3%"]
    assert [size(n) for n in (5, 1500, 2_000_000)] == ["5 B", "1.5 kB", "2 MB"]
    assert [duration(s) for s in (1.26, 300, 8000)] == ["1.26 s", "5 min", "2 h 13 min"]
    assert [plain(v) for v in (12345.6, 0.0012345)] == ["12,346", "0.001234"]


@given(st.lists(st.sampled_from("AB"), min_size=1))
def test_stretches_of_equal_values_are_the_values(values: list[str]) -> None:
    found = runs_of(values)
    assert [v for begin, end, v in found for _ in range(begin, end)] == values
    assert all(a[2] != b[2] for a, b in pairwise(found))
    assert math.isclose(found[-1][1], len(values))
