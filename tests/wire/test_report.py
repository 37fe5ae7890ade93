"""`Report`: every field has a row, limits hold, and what is written is what is read."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora_flwr import wire
from fedlora_flwr.errors import InvalidValue
from fedlora_flwr.wire import limits
from fedlora_flwr.wire.limits import Number, Text, shown
from fedlora_flwr.wire.records import fit_content, read_figures, read_training, train_records
from fedlora_flwr.wire.report import Report

ARRAYS = {"b.lora_A.weight": np.ones((2, 3), np.float32), "h": np.zeros(2, np.float32)}
FULL = Report(
    client="ward-3", status="ok", arrays=ARRAYS, epsilon=1.5,
    epsilon_budget=8.0, delta=1e-5, accountant="prv", steps=7, seconds=0.25, peak_memory_mb=100.5,
    weight=3.0, num_examples=3, unprotected={"loss": 0.125}, measured={"accuracy": 0.5, "n": 3},
    notes={"note": "fine", "flag": True, "raw": b"\0"},
)  # fmt: skip


def same(one: Report, other: Report) -> bool:
    arrays = one.arrays.keys() == other.arrays.keys() and all(
        np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items()
    )
    return arrays and all(
        getattr(one, entry.name) == getattr(other, entry.name)
        for entry in fields(Report)
        if entry.name != "arrays"
    )


def test_every_field_says_who_decides_it_what_is_allowed_and_why() -> None:
    for entry in fields(Report):
        about = entry.metadata
        assert about["decides"] in ("device", "run", "package"), entry.name
        assert about["allowed"], entry.name
        assert about["why"].strip().endswith("."), entry.name
        assert about["word"], entry.name


def test_what_is_written_is_what_is_read() -> None:
    assert same(read_training(train_records(FULL)), FULL)


def test_a_numpy_clients_flat_scalars_hold_the_same() -> None:
    arrays, examples, metrics = FULL.to_fit()
    assert metrics[wire.NAMES] == "b.lora_A.weight,h"
    assert same(Report.of_fit(arrays, (), metrics, examples).checked(), FULL)
    content = fit_content(arrays, (), metrics, examples)
    assert set(content) == {"arrays", "metrics", "config"}
    assert wire.NAMES not in content.config_records["config"]
    assert same(read_training(content), FULL)


def test_what_is_empty_does_not_travel() -> None:
    content = train_records(Report(arrays=ARRAYS))
    assert dict(content.metric_records["metrics"]) == {}
    assert dict(content.config_records["config"]) == {}


numbers = st.one_of(
    st.floats(), st.integers(), st.integers(10**300, 10**310), st.booleans(), st.none(),
    st.text(max_size=5), st.binary(max_size=5), st.lists(st.floats(), max_size=3),
)  # fmt: skip
words = st.one_of(
    st.sampled_from([*(entry.metadata["word"] for entry in fields(Report)), "unprotected-x"]),
    st.text(max_size=20),
)


@given(st.dictionaries(words, numbers, max_size=4), st.dictionaries(words, numbers, max_size=4))
def test_anything_is_read_or_refused_in_one_sentence(
    metrics: dict[str, object], texts: dict[str, object]
) -> None:
    content = RecordDict({"metrics": MetricRecord(), "config": ConfigRecord()})
    content.metric_records["metrics"].__dict__["_data"].update(metrics)
    content.config_records["config"].__dict__["_data"].update(texts)
    try:
        report = read_figures(content)
    except InvalidValue as error:
        refused = str(error)
        assert len(refused) < 700
        assert refused.endswith(".")
        return
    for name, value in report.numbers().items():
        assert type(value) in (int, float)
        assert math.isfinite(value) or (name in ("epsilon", "epsilon-budget") and value > 0)
        assert name.isprintable()
    for name, text in report.texts().items():
        assert name.isprintable()
        assert not isinstance(text, str) or text.isprintable()


@pytest.mark.parametrize("entry", fields(Report), ids=lambda entry: entry.name)
def test_a_value_at_its_limit_is_read_and_one_past_it_is_refused(entry: Any) -> None:
    limit = entry.metadata["limit"]
    good: list[object]
    bad: list[object]
    if isinstance(limit, Number):
        good = [limit.most, *([] if limit.above else [limit.least])]
        bad = [limit.most * 1.01 + 1, limit.least - 1, math.nan, -math.inf, True, "1", None, [1.0]]
        bad += [limit.least] if limit.above else []
        bad += [] if limit.unbounded else [math.inf]
        bad += [0.5] if limit.whole else []
    elif isinstance(limit, Text):
        good = list(limit.choices) or ["x", "x" * limit.longest, "Station 3, été"]
        bad = ["", " ", "x" * (limit.longest + 1), "a\nb", "\x1b[2J", "\u202e", 1, True, None, b"x"]
    else:
        return
    for value in good:
        assert limit.read("w", value) == value
    for value in bad:
        with pytest.raises(InvalidValue, match="w = "):
            limit.read("w", value)


@pytest.mark.parametrize("count", [limits.MOST_NUMBERS, limits.MOST_NUMBERS + 1])
def test_further_numbers_are_bounded_in_number(count: int) -> None:
    report = Report(measured={f"m{i}": 1.0 for i in range(count)})
    if count <= limits.MOST_NUMBERS:
        report.checked()
    else:
        with pytest.raises(InvalidValue, match="further numbers = 65"):
            report.checked()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_arrays_come_out_in_fp32(dtype: str) -> None:
    found = Report(arrays={"a": np.array([1.5, -2.0], dtype)}).checked().arrays["a"]
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, -2.0]


def test_an_epsilon_above_its_own_budget_is_refused() -> None:
    Report(epsilon=8.0, epsilon_budget=8.0).checked()
    Report(epsilon=math.inf, epsilon_budget=math.inf).checked()
    with pytest.raises(InvalidValue, match=r"epsilon = 8.1 cannot be used: expected at most"):
        Report(epsilon=8.1, epsilon_budget=8.0).checked()


@given(numbers)
def test_what_an_error_shows_of_a_value_is_short(value: object) -> None:
    assert len(repr(shown(value))) < 300


def test_a_value_of_ten_megabytes_is_not_shown() -> None:
    for value in ("x" * 10**7, b"x" * 10**7, [1.0] * 10**6, 10**5000):
        assert len(repr(shown(value))) < 60
