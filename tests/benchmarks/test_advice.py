"""What a plan advises is what the committed rows support, by the rule that the page states."""

from __future__ import annotations

import math
import re

import pytest
from scipy.stats import ttest_ind, ttest_rel  # type: ignore[import-untyped]

from benchmarks.advice import PAGE, choose, difference, measured, page_table, toml
from benchmarks.advice_rows import SOURCES, Run, Source, runs
from fedlora_flwr.forecast.advice import TABLE

SHOWN = PAGE.read_text(encoding="utf-8")


def made(row: str, finals: list[float], uploaded: float = 10.0, **settings: str) -> list[Run]:
    return [
        Run(row, {"strategy": row, **settings}, seed, final, uploaded)
        for seed, final in enumerate(finals, 1)
    ]


def test_the_packages_table_and_the_pages_are_made_of_the_rows() -> None:
    found = tuple(measured())
    assert len(found) > 10
    assert toml(found) == TABLE.read_text(encoding="utf-8")
    assert page_table(found) in SHOWN


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.file + source.trust_model)
def test_a_source_has_rows_and_a_section_of_the_page(source: Source) -> None:
    assert runs(source)
    anchors = [
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^##+ (.+)$", SHOWN, re.M)
    ]
    assert source.section in anchors


def test_three_common_seeds_are_paired_and_fewer_are_not() -> None:
    one, other = [0.80, 0.84, 0.79, 0.86], [0.78, 0.83, 0.78, 0.83]
    paired = difference(made("a", one), made("b", other))
    ends = ttest_rel(one, other).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((ends.low, ends.high))
    assert paired.told_apart
    apart = difference(made("a", one[:2]), made("b", other))
    ends = ttest_ind(one[:2], other).confidence_interval(0.95)
    assert (apart.low, apart.high) == pytest.approx((ends.low, ends.high))
    assert not apart.told_apart


def test_one_run_beside_several_has_an_interval_and_two_single_runs_have_none() -> None:
    several = made("b", [0.75, 0.77, 0.76])
    assert difference(made("a", [0.90]), several).told_apart
    assert not difference(made("a", [0.78]), several).told_apart
    assert math.isnan(difference(made("a", [0.90]), made("b", [0.10])).low)


def test_the_cheapest_of_what_is_not_told_apart_is_taken() -> None:
    rows = {
        "best": made("best", [0.80, 0.84, 0.79, 0.86]),
        "alike": made("alike", [0.81, 0.82, 0.79, 0.85], 5),
        "behind": made("behind", [0.70, 0.75, 0.69, 0.76], 1),
    }
    taken, best, others = choose(rows)
    assert (taken, best) == ("alike", "best")
    assert others == {"alike": ("alike",), "behind": ("behind",), "open": ()}


def test_of_rows_that_send_as_much_the_one_that_publishes_no_sizes_is_taken() -> None:
    sized = made("sized", [0.80, 0.84, 0.79, 0.86], weighting="size")
    rows = {"sized": sized, "alike": made("alike", [0.81, 0.82, 0.79, 0.85])}
    assert choose(rows)[:2] == ("alike", "sized")


def test_a_row_with_one_seed_is_no_reason_to_leave_the_best() -> None:
    rows = {"best": made("best", [0.8]), "cheap": made("cheap", [0.79], 1)}
    taken, _, others = choose(rows)
    assert taken == "best"
    assert others["open"] == ("cheap",)
