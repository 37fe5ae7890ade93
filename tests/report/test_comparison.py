"""Several runs in one report."""

from __future__ import annotations

import pytest
from scipy import stats  # type: ignore[import-untyped]

from fedlora_flwr.report.comparison import interval, settings_of
from fedlora_flwr.report.page import runs_report
from tests.report.support import facts, parsed, seeds, texts

GOOD = {1: 0.80, 2: 0.84, 3: 0.79}


def test_the_interval_is_that_of_students_t() -> None:
    values = [*GOOD.values()]
    expected = stats.t.interval(0.95, 2, stats.tmean(values), stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    assert interval([0.5]) is None


def test_runs_that_differ_by_their_seed_alone_are_one_setting() -> None:
    runs = [*seeds(GOOD), *seeds({1: 0.7, 2: 0.72}, strategy="ffa-lora", rank=8)]
    found = settings_of(runs)
    assert [(one.name, len(one.runs)) for one in found] == [
        ("rolora, rank = 4", 3),
        ("ffa-lora, rank = 8", 2),
    ]
    assert found[0].finals() == [0.80, 0.84, 0.79]
    line = found[0].line("accuracy")
    assert line.points[-1] == pytest.approx((4.0, 0.81))
    ends = interval([*GOOD.values()])
    assert ends is not None
    assert line.band[-1] == (4.0, *ends)


def test_the_report_has_a_row_per_setting_and_per_run() -> None:
    runs = [*seeds(GOOD), *seeds({1: 0.7, 2: 0.72}, strategy="ffa-lora")]
    failed = facts(config=runs[0].config, summary={"status": "failed"})
    document = parsed(runs_report([*runs, failed]))
    settings, each = [
        [[texts(cell) for cell in line] for line in table.iter("tr")][1:]
        for table in document.iter("table")
        if "by setting" in str(table[0].text) or table[0].text == "Runs of this report"
    ]
    assert settings[0][:4] == ["rolora", "4", "81%", "74.4% to 87.6%"]
    assert settings[0][-1] == "1"
    assert settings[1][:3] == ["ffa-lora", "2", "71%"]
    assert len(each) == 6
    assert each[0][0] == "seed-1"
    (chart,) = (s for s in document.iter("svg") if "Accuracy" in s.get("aria-label", ""))
    assert len([*chart.iter("polygon")]) == 2


def test_a_single_seed_has_no_interval() -> None:
    page = runs_report([*seeds({1: 0.8}), *seeds({1: 0.7}, strategy="ffa-lora")])
    assert "<polygon" not in page
    assert "<td>–</td>" in page
